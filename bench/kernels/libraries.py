"""FlashAttention 3 and FlashInfer as arms of the block_attention benchmark: attention alone.

Arms: `fa3`, SGLang's FlashAttention 3; `flashinfer_fa2` and `flashinfer_fa3`, the paged prefill
wrapper with its plan made before; `flashinfer_uniform`, its decode wrapper, which knows that all
queries are equally long but masks causally. A plan is host work, once a step: `plan_us`.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.kernels.prebuild import use_prebuilt
from bench.kernels.timing import Arm

ARMS = ("fa3", "flashinfer_fa2", "flashinfer_fa3", "flashinfer_uniform")
ATTENTION_ONLY = "attention only: without norm, RoPE and the block's K/V write"

WORKSPACE_BYTES = 512 << 20  # as SGLang gives FlashInfer for large models


def page_tables(inputs: Any) -> list[Tensor]:
    """Page of each of a request's pages, [batch, pages] int32."""
    page = inputs.page
    return [(x["req_to_token"][:, ::page] // page).contiguous() for x in inputs.sets]


def pools_of(x: dict[str, Any], inputs: Any) -> tuple[Tensor, Tensor]:
    """[pages, page, KV, hd] each."""
    paged = (-1, inputs.page, inputs.pair.kv_heads, inputs.pair.head_dim)
    return x["k_pool"].view(paged), x["v_pool"].view(paged)


def fa3_arm(inputs: Any) -> Arm:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache, is_fa3_supported

    if not is_fa3_supported():
        major, minor = torch.cuda.get_device_capability()
        raise NotImplementedError(f"SGLang has no FA3 kernels for sm_{major}{minor}")
    queries, tables = inputs.queries, page_tables(inputs)
    pair, device = inputs.pair, inputs.device
    lens = torch.full((inputs.batch,), inputs.context + pair.block, device=device).int()
    starts = torch.arange(inputs.batch + 1, device=device).int() * pair.block

    def run(i: int) -> Tensor:
        k_cache, v_cache = pools_of(inputs.sets[i], inputs)
        return flash_attn_with_kvcache(
            q=queries[i],
            k_cache=k_cache,
            v_cache=v_cache,
            page_table=tables[i],
            cache_seqlens=lens,
            cu_seqlens_q=starts,
            max_seqlen_q=pair.block,
            softmax_scale=inputs.sets[i]["scale"],
            causal=False,
        ).flatten(1)

    return Arm("fa3", run, inputs.work, note=ATTENTION_ONLY)


class Pages:
    """A buffer set's pages as FlashInfer wants them, all int32 on the device."""

    def __init__(self, table: Tensor, inputs: Any) -> None:
        pages_each = inputs.tokens // inputs.page
        counts = torch.arange(inputs.batch + 1, device=inputs.device).int()
        last = (inputs.context + inputs.pair.block - 1) % inputs.page + 1
        self.query_starts = counts * inputs.pair.block
        self.starts = counts * pages_each
        self.indices = table.flatten()
        self.last = torch.full((inputs.batch,), last, device=inputs.device).int()


Plan = Callable[[], None]


def plan_arguments(pages: Pages, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What both wrappers' `plan` take, in place and by name."""
    pair = inputs.pair
    sizes = (pair.heads, pair.kv_heads, pair.head_dim, inputs.page)
    named = {
        "sm_scale": pair.head_dim**-0.5,
        "q_data_type": inputs.dtype,
        "kv_data_type": inputs.dtype,
    }
    return (pages.starts, pages.indices, pages.last, *sizes), named


def prefill_wrapper(
    backend: str, flashinfer: Any, workspace: Tensor, pages: Pages, inputs: Any
) -> tuple[Any, Plan]:
    """Paged prefill, which is told each request's queries; not causal."""
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        qo_indptr_buf=torch.empty_like(pages.query_starts),
        paged_kv_indptr_buf=torch.empty_like(pages.starts),
        paged_kv_indices_buf=torch.empty_like(pages.indices),
        paged_kv_last_page_len_buf=torch.empty_like(pages.last),
        backend=backend,
    )
    positional, named = plan_arguments(pages, inputs)
    return wrapper, lambda: wrapper.plan(pages.query_starts, *positional, causal=False, **named)


def uniform_wrapper(
    flashinfer: Any, workspace: Tensor, pages: Pages, inputs: Any
) -> tuple[Any, Plan]:
    """Decode with as many queries a request as the block has; causal within it."""
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.empty_like(pages.starts),
        paged_kv_indices_buffer=torch.empty_like(pages.indices),
        paged_kv_last_page_len_buffer=torch.empty_like(pages.last),
        backend="fa2",  # the only one that takes several queries a request on every architecture
    )
    positional, named = plan_arguments(pages, inputs)
    return wrapper, lambda: wrapper.plan(*positional, q_len_per_req=inputs.pair.block, **named)


def flashinfer_arm(name: str, make: Callable[..., tuple[Any, Plan]], inputs: Any) -> Arm:
    """One wrapper a set, planned before; they share the workspace, for they never overlap."""
    import flashinfer

    if prebuilt := os.environ.get("FLASHINFER_MODULES"):
        use_prebuilt(Path(prebuilt))
    queries = inputs.queries
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device)
    wrappers, plan_us = [], []
    for table in page_tables(inputs):
        wrapper, plan = make(flashinfer, workspace, Pages(table, inputs), inputs)
        plan()  # the first of all compiles the kernel
        torch.cuda.synchronize()
        start = time.perf_counter()
        plan()
        plan_us.append((time.perf_counter() - start) * 1e6)
        wrappers.append(wrapper)

    def run(i: int) -> Tensor:
        return wrappers[i].run(queries[i], pools_of(inputs.sets[i], inputs)).flatten(1)

    planned = statistics.median(plan_us)
    return Arm(name, run, inputs.work, note=ATTENTION_ONLY, plan_us=planned)


def makers(inputs: Any) -> dict[str, Callable[[], Arm]]:
    wrappers: dict[str, Callable[..., tuple[Any, Plan]]] = {
        "flashinfer_fa2": functools.partial(prefill_wrapper, "fa2"),
        "flashinfer_fa3": functools.partial(prefill_wrapper, "fa3"),
        "flashinfer_uniform": uniform_wrapper,
    }
    found: dict[str, Callable[[], Arm]] = {"fa3": lambda: fa3_arm(inputs)}
    for name, make in wrappers.items():
        found[name] = functools.partial(flashinfer_arm, name, make, inputs)
    return found
