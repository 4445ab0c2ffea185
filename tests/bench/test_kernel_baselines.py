"""The libraries' arms on the CPU: stand-ins that do what the libraries say, in PyTorch.

They hold page tables, lengths and layouts against the operator's reference, which on a GPU would
show only as a baseline with a wrong result.
"""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import block_attention
import pytest
import session
import torch
from attention_arms import BlockInputs, Shape, make_sets, prologue_arm
from device import Peaks
from library_arms import library_makers
from measure import build
from models import PAIRS

from dflare import ops
from dflare.ops.reference_math import attend, visibility

NAMES = ("fa3", "flashinfer_fa2", "flashinfer_fa3", "flashinfer_uniform")


def paged(q, pools, pages_of, lengths, starts, causal, scale):
    """Attention of queries starts[b] to starts[b + 1] over lengths[b] tokens in those pages."""
    out = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        k, v = (pool[pages_of(b).long()].flatten(0, 1)[:length] for pool in pools)
        index = torch.arange(length)
        visible = visibility(index[length - (rows.stop - rows.start) :], index, -1, causal)
        out[rows] = attend(q[rows], k, v, visible, scale)
    return out


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    page_table,
    cache_seqlens,
    cu_seqlens_q,
    max_seqlen_q,
    softmax_scale,
    causal,
):
    assert page_table.dtype == cache_seqlens.dtype == cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == int(cu_seqlens_q.diff().max()) and page_table.is_contiguous()
    pools = k_cache, v_cache
    return paged(
        q, pools, page_table.__getitem__, cache_seqlens, cu_seqlens_q, causal, softmax_scale
    )


class Wrapper:
    """What both FlashInfer wrappers share: a plan with the pages' places, then runs."""

    def attend(self, q, pools, starts, causal):
        first, indices, last, page = self.planned
        assert q.shape[1:] == self.heads and page == pools[0].shape[1]
        assert first.dtype == indices.dtype == last.dtype == torch.int32
        lengths = (first.diff() - 1) * page + last

        def pages_of(b):
            return indices[first[b] : first[b + 1]]

        return paged(q, pools, pages_of, lengths, starts, causal, self.scale)

    def plan_pages(self, pages, page, heads, kv_heads, head_dim, scale):
        self.planned = (*pages, page)
        self.heads, self.scale = (heads, head_dim), scale


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    def __init__(self, workspace, layout, *, use_cuda_graph, backend, **buffers):
        assert layout == "NHD" and use_cuda_graph and workspace.dtype == torch.uint8
        assert backend in ("fa2", "fa3") and len(buffers) == 4

    def plan(
        self,
        starts,
        first,
        indices,
        last,
        heads,
        kv_heads,
        head_dim,
        page,
        *,
        causal,
        sm_scale,
        **_,
    ):
        self.starts, self.causal = starts, causal
        self.plan_pages((first, indices, last), page, heads, kv_heads, head_dim, sm_scale)

    def run(self, q, pools):
        return self.attend(q, pools, self.starts, self.causal)


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    def __init__(self, workspace, layout, *, use_cuda_graph, use_tensor_cores, backend, **buffers):
        assert layout == "NHD" and use_cuda_graph and use_tensor_cores and len(buffers) == 3

    def plan(
        self, first, indices, last, heads, kv_heads, head_dim, page, *, sm_scale, q_len_per_req, **_
    ):
        self.queries = q_len_per_req
        self.plan_pages((first, indices, last), page, heads, kv_heads, head_dim, sm_scale)

    def run(self, q, pools):
        starts = torch.arange(len(q) // self.queries + 1) * self.queries
        return self.attend(q, pools, starts, causal=True)


@pytest.fixture
def libraries(monkeypatch):
    flash_attn = types.ModuleType("sgl_kernel.flash_attn")
    flash_attn.flash_attn_with_kvcache = flash_attn_with_kvcache
    flash_attn.is_fa3_supported = lambda: True
    flashinfer = types.ModuleType("flashinfer")
    flashinfer.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    monkeypatch.setitem(sys.modules, "sgl_kernel", types.ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", flash_attn)
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return flash_attn


def arms_of(shape):
    inputs = BlockInputs(make_sets(shape, 2), shape)
    return inputs, build(library_makers(inputs), NAMES)


@pytest.mark.parametrize("batch, context, page", [(1, 1, 1), (3, 21, 1), (3, 21, 4), (2, 64, 16)])
def test_libraries_are_given_the_cache_that_the_operator_reads(batch, context, page, libraries):
    shape = Shape(PAIRS["smollm2-135m"], batch, context, page, torch.float32, "cpu")
    inputs, arms = arms_of(shape)
    assert not [arm.failure for arm in arms if arm.failure]
    block_attention.refcheck(inputs.sets[0], arms)
    errors = {arm.name: arm.error for arm in arms}
    assert errors.pop("flashinfer_uniform") is None
    assert max(errors.values()) < 1e-5
    assert all((arm.plan_us is not None) == (arm.name != "fa3") for arm in arms)
    # The last query of a block sees all of it, causal or not; a set has its own buffers.
    last = slice(shape.pair.block - 1, None, shape.pair.block)
    for i in range(2):
        out = {arm.name: arm.run(i) for arm in arms}
        assert torch.allclose(out["flashinfer_uniform"][last], out["fa3"][last], atol=1e-5)
    assert not torch.allclose(arms[0].run(0), arms[0].run(1), atol=1e-3)


def test_fa3_is_not_launched_where_it_has_no_kernels(libraries, monkeypatch):
    libraries.is_fa3_supported = lambda: False
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    arms = arms_of(Shape(PAIRS["smollm2-135m"], 1, 8, 1, torch.float32, "cpu"))[1]
    assert arms[0].failure == "NotImplementedError: SGLang has no FA3 kernels for sm_100"
    assert not any(arm.failure for arm in arms[1:])


def test_the_prologue_fills_the_slots_that_baselines_read(monkeypatch):
    """Uncompiled; what torch.compile makes of it is the same operations."""
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: run)
    shape = Shape(PAIRS["smollm2-135m"], 2, 21, 4, torch.float32, "cpu")
    inputs = BlockInputs(make_sets(shape, 1), shape)
    queries = prologue_arm(inputs).run(0)
    table, pool = inputs.sets[0]["req_to_token"], inputs.sets[0]["k_pool"]
    first = pool[table[:, 21].long()]
    inputs.sets[0]["k_pool"].zero_()
    assert torch.equal(queries, inputs.queries[0])
    assert torch.equal(pool[table[:, 21].long()], first)
    assert not pool[table[:, :21].long().flatten()].any()


def test_every_arm_of_a_gpu_comes_to_a_line_and_a_layers_total(libraries, monkeypatch, capsys):
    """The arms that a GPU has, on the CPU: nothing compiled, no graphs, a schedule of zeros."""
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: run)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(ops, "block_attention_schedule", lambda *_: torch.zeros(4))
    monkeypatch.setattr(session, "measure_peaks", lambda *_: Peaks(20.0, 18.0, 0.5))
    arguments = block_attention.parse(["--model", "smollm2-135m", "--refcheck", "--rounds", "2"])
    arguments.device, arguments.dtype = "cpu", "float32"
    run = session.Session("block_attention", arguments)
    shape = Shape(PAIRS["smollm2-135m"], 2, 21, 4, torch.float32, "cpu")
    block_attention.run_shape(run, shape, "smollm2-135m")
    assert run.status() == 0
    captured = capsys.readouterr()
    lines = {line["arm"]: line for line in map(json.loads, captured.out.splitlines())}
    assert tuple(lines) == block_attention.ARMS
    assert lines["schedule"]["gb_s"] is None and lines["prologue"]["gb_s"] > 0
    assert lines["prologue"]["bytes"] < lines["fa3"]["bytes"] == lines["dflare"]["bytes"]
    totals = captured.err.partition("a layer with all that it takes")[2]
    assert all(totals.count(f" {name} ") == 1 for name in (*NAMES, "dflare", "eager"))


def test_results_of_a_large_batch_are_checked_at_its_ends_and_middle():
    assert block_attention.some_requests(1) == [0]
    assert block_attention.some_requests(3) == [0, 1, 2]
    assert block_attention.some_requests(256) == [0, 1, 128, 255]


@pytest.mark.parametrize("commits", ["none", "random"])
def test_upstreams_writer_gives_what_the_operator_gives(commits):
    """The Triton kernel itself, in Triton's interpreter, which must be chosen before an import."""
    pytest.importorskip("sglang")
    program = (
        "import sys, torch; from append_arms import *; from append_context_kv import refcheck; "
        "from models import PAIRS; "
        f"shape = Shape(PAIRS['smollm2-135m'], 18, '{commits}', torch.bfloat16, 'cpu'); "
        "sets = [make_set(shape, torch.Generator().manual_seed(0))]; "
        "arm = dspark_arm(sets, shape); refcheck([arm], sets[0], shape); "
        "sys.exit(arm.failure or not arm.error < 2e-2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(block_attention.__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
