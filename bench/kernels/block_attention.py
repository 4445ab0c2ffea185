"""Benchmark of block_attention against PyTorch, FlashInfer and FlashAttention 3.

    python bench/kernels/block_attention.py --batch 1 8 32 --context 1024 4096 > attention.jsonl
    python bench/kernels/block_attention.py --device cpu --model smollm2-135m --dtype float32
    ncu --profile-from-start off python bench/kernels/block_attention.py --profile dflare ...

Arms: `dflare`, one layer with the schedule made before; `schedule`, that schedule, once a step;
`eager`, norm and RoPE in PyTorch, gather, scaled_dot_product_attention; `compile`, the same under
torch.compile; `fa3`, SGLang's FlashAttention 3; `flashinfer_fa2` and `flashinfer_fa3`, the paged
prefill wrapper with its plan made before; `flashinfer_uniform`, its decode wrapper, which knows
that all queries are equally long but masks causally; `prologue`, what those four leave out: norm,
RoPE and the block's K/V write (torch.compile). A plan is host work: field plan_us of its arms.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    Arm,
    buffer_sets,
    environment,
    measure_peaks,
    profile,
    relative_error,
    report,
    time_on_cpu,
    time_on_gpu,
)
from models import PAIRS, Pair
from torch import Tensor

from dflare import ops
from dflare.ops.reference_math import apply_rope, rms_norm

EPS = 1e-6
ATTENTION_ONLY = "attention only: without norm, RoPE and the block's K/V write"


@dataclass(frozen=True)
class Shape:
    pair: Pair
    batch: int
    context: int
    page: int
    dtype: torch.dtype
    device: str

    @property
    def tokens(self) -> int:
        """Slots a request takes: context and block, whole pages."""
        return -(-(self.context + self.pair.block) // self.page) * self.page

    @property
    def kv_bytes(self) -> int:
        pair = self.pair
        per_token = 2 * pair.kv_heads * pair.head_dim * self.dtype.itemsize
        return self.batch * self.tokens * per_token

    def work(self) -> tuple[float, float]:
        """Fewest bytes through memory and operations."""
        pair, rows = self.pair, self.batch * self.pair.block
        columns = 2 * pair.heads + 2 * pair.kv_heads
        context = self.batch * self.context * 2 * pair.kv_heads
        moved = (context + rows * columns) * pair.head_dim * self.dtype.itemsize
        keys = self.context + pair.block
        return moved, 4 * rows * pair.heads * keys * pair.head_dim


def make_set(shape: Shape) -> dict[str, Any]:
    """Arguments of the op on a cache of its own; block tokens have slots for the baselines."""
    pair, device, batch = shape.pair, shape.device, shape.batch
    pages_each = shape.tokens // shape.page
    pages = torch.randperm(batch * pages_each, device=device, dtype=torch.int32)
    pages = pages.view(batch, pages_each)
    offsets = torch.arange(shape.page, device=device, dtype=torch.int32)
    table = (pages[..., None] * shape.page + offsets).flatten(1)
    pools = torch.randn(2, batch * shape.tokens, pair.kv_heads, pair.head_dim, device=device).to(
        shape.dtype
    )
    angles = torch.rand(shape.context + 64, pair.head_dim // 2, device=device) * 6.28
    rows, columns = batch * pair.block, (pair.heads + 2 * pair.kv_heads) * pair.head_dim
    return {
        "qkv": torch.randn(rows, columns, device=device).to(shape.dtype),
        "q_norm_weight": torch.ones(pair.head_dim, device=device, dtype=shape.dtype),
        "k_norm_weight": torch.ones(pair.head_dim, device=device, dtype=shape.dtype),
        "eps": EPS,
        "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], 1),
        "positions": (shape.context + torch.arange(pair.block, device=device)).repeat(batch),
        "k_pool": pools[0],
        "v_pool": pools[1],
        "req_to_token": table,
        "req_pool_indices": torch.arange(batch, device=device),
        "seq_lens": torch.full((batch,), shape.context, device=device),
        "block_size": pair.block,
        "window": -1,
        "causal": False,
        "scale": pair.head_dim**-0.5,
    }


def split_heads(x: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the block; q and k normalised and rotated."""
    kv_heads, head_dim = x["k_pool"].shape[1:]
    heads = x["qkv"].unflatten(1, (-1, head_dim))
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    q = apply_rope(rms_norm(q, x["q_norm_weight"], EPS), x["cos_sin_cache"], x["positions"])
    k = apply_rope(rms_norm(k, x["k_norm_weight"], EPS), x["cos_sin_cache"], x["positions"])
    return q, k, v


def block_slots(x: dict[str, Any], context: int) -> Tensor:
    return x["req_to_token"][:, context : context + x["block_size"]].flatten().long()


def gather_and_attend(x: dict[str, Any], context: int) -> Tensor:
    """All requests have the same context length, so that this needs no loop over them."""
    batch, block = x["seq_lens"].shape[0], x["block_size"]
    q, k, v = (t.unflatten(0, (batch, block)) for t in split_heads(x))
    slots = x["req_to_token"][:, :context].long()
    keys, values = (
        torch.cat([pool[slots], own], 1).transpose(1, 2)
        for pool, own in ((x["k_pool"], k), (x["v_pool"], v))
    )
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, scale=x["scale"], enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def prologue(x: dict[str, Any], slots: Tensor) -> Tensor:
    """What a stock backend needs before attention: the block's K/V go to the pool."""
    q, k, v = split_heads(x)
    x["k_pool"].index_copy_(0, slots, k)
    x["v_pool"].index_copy_(0, slots, v)
    return q


def fa3_arm(sets: list[dict[str, Any]], queries: list[Tensor], shape: Shape) -> Arm | None:
    try:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache
    except (ImportError, OSError):
        return None
    pair, device = shape.pair, shape.device
    lens = torch.full((shape.batch,), shape.context + pair.block, device=device).int()
    starts = torch.arange(shape.batch + 1, device=device).int() * pair.block
    tables = [(x["req_to_token"][:, :: shape.page] // shape.page).contiguous() for x in sets]

    def run(i: int) -> Tensor:
        paged = (-1, shape.page, pair.kv_heads, pair.head_dim)
        return flash_attn_with_kvcache(
            q=queries[i],
            k_cache=sets[i]["k_pool"].view(paged),
            v_cache=sets[i]["v_pool"].view(paged),
            page_table=tables[i],
            cache_seqlens=lens,
            cu_seqlens_q=starts,
            max_seqlen_q=pair.block,
            softmax_scale=sets[i]["scale"],
            causal=False,
        ).flatten(1)

    return Arm("fa3", run, note=ATTENTION_ONLY)


def flashinfer_arms(
    sets: list[dict[str, Any]], queries: list[Tensor], shape: Shape
) -> list[tuple[Arm, float]]:
    """Arms with the host time of their plan in microseconds."""
    try:
        import flashinfer
    except ImportError:
        return []
    pair, device, batch = shape.pair, shape.device, shape.batch
    last_page = (shape.context + pair.block - 1) % shape.page + 1
    pages_each = shape.tokens // shape.page
    indptr = torch.arange(batch + 1, device=device).int() * pages_each
    last = torch.full((batch,), last_page, device=device).int()
    starts = torch.arange(batch + 1, device=device).int() * pair.block
    indices = [(x["req_to_token"][:, :: shape.page] // shape.page).flatten() for x in sets]
    kinds = {
        "flashinfer_fa2": functools.partial(prefill_wrapper, flashinfer, "fa2", starts),
        "flashinfer_fa3": functools.partial(prefill_wrapper, flashinfer, "fa3", starts),
        "flashinfer_uniform": functools.partial(decode_wrapper, flashinfer),
    }
    arms = []
    for name, make in kinds.items():
        try:
            wrappers, plan_us = [], []
            for index in indices:
                wrapper, plan = make(indptr, index, last, shape)
                for _ in range(5):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    plan()
                    plan_us.append((time.perf_counter() - start) * 1e6)
                wrappers.append(wrapper)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue

        def run(i: int, wrappers: list[Any] = wrappers) -> Tensor:
            paged = (-1, shape.page, pair.kv_heads, pair.head_dim)
            pools = sets[i]["k_pool"].view(paged), sets[i]["v_pool"].view(paged)
            return wrappers[i].run(queries[i], pools).flatten(1)

        arms.append((Arm(name, run, note=ATTENTION_ONLY), statistics.median(plan_us)))
    return arms


def prefill_wrapper(
    flashinfer: Any,
    backend: str,
    starts: Tensor,
    indptr: Tensor,
    indices: Tensor,
    last: Tensor,
    shape: Shape,
) -> tuple[Any, Callable[[], None]]:
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=shape.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        qo_indptr_buf=torch.empty_like(starts),
        paged_kv_indptr_buf=torch.empty_like(indptr),
        paged_kv_indices_buf=torch.empty_like(indices),
        paged_kv_last_page_len_buf=torch.empty_like(last),
        backend=backend,
    )
    pair = shape.pair
    return wrapper, lambda: wrapper.plan(
        starts,
        indptr,
        indices,
        last,
        pair.heads,
        pair.kv_heads,
        pair.head_dim,
        shape.page,
        causal=False,
        sm_scale=pair.head_dim**-0.5,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
    )


def decode_wrapper(
    flashinfer: Any, indptr: Tensor, indices: Tensor, last: Tensor, shape: Shape
) -> tuple[Any, Callable[[], None]]:
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=shape.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.empty_like(indptr),
        paged_kv_indices_buffer=torch.empty_like(indices),
        paged_kv_last_page_len_buffer=torch.empty_like(last),
    )
    pair = shape.pair
    return wrapper, lambda: wrapper.plan(
        indptr,
        indices,
        last,
        pair.heads,
        pair.kv_heads,
        pair.head_dim,
        shape.page,
        sm_scale=pair.head_dim**-0.5,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
        q_len_per_req=pair.block,
    )


def make_arms(sets: list[dict[str, Any]], shape: Shape) -> tuple[list[Arm], dict[str, float]]:
    """Arms, and the plan time of those that have one."""
    pair, context = shape.pair, shape.context
    compiled = torch.compile(gather_and_attend, dynamic=False)
    eager = Arm("eager", lambda i: gather_and_attend(sets[i], context))
    by_compiler = Arm("compile", lambda i: compiled(sets[i], context))
    if shape.device == "cpu":
        return [Arm("dflare", lambda i: ops.block_attention(**sets[i])), eager, by_compiler], {}

    def schedule(i: int) -> Tensor:
        return torch.ops.dflare.block_attention_schedule(
            sets[i]["seq_lens"], pair.block, pair.heads, pair.kv_heads, pair.head_dim, -1
        )

    schedules = [schedule(i) for i in range(len(sets))]
    slots = [block_slots(x, context) for x in sets]
    write_block = torch.compile(prologue, dynamic=False)
    queries = [prologue(x, s) for x, s in zip(sets, slots, strict=True)]
    arms = [
        Arm("dflare", lambda i: ops.block_attention(**sets[i], schedule=schedules[i])),
        Arm("schedule", schedule, note="once a step, for all layers"),
        eager,
        by_compiler,
        Arm("prologue", lambda i: write_block(sets[i], slots[i]), note="for stock backends"),
    ]
    if fa3 := fa3_arm(sets, queries, shape):
        arms.append(fa3)
    planned = flashinfer_arms(sets, queries, shape)
    return [*arms, *(arm for arm, _ in planned)], {arm.name: us for arm, us in planned}


def refcheck(arms: list[Arm], x: dict[str, Any]) -> None:
    """Errors of the arms on set 0 against the reference in float64."""
    exact = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in x.items()
    }
    expected = ops.block_attention_reference(**exact)
    for arm in arms:
        if arm.name not in ("schedule", "prologue", "flashinfer_uniform"):
            out = arm.run(0)
            assert isinstance(out, Tensor)
            arm.error = relative_error([out], [expected])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--model", choices=PAIRS, nargs="+", default=["qwen3-4b"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--page", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--refcheck", action="store_true", help="errors against float64")
    parser.add_argument("--profile", metavar="ARM", help="one call of one arm, no timing")
    arguments = parser.parse_args()
    if arguments.profile and arguments.device == "cpu":
        parser.error("--profile marks one call for ncu: it needs --device cuda")
    return arguments


def main() -> None:
    arguments = parse()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    peaks = None if arguments.profile else measure_peaks(device, dtype)
    setting = {} if arguments.profile else environment(device)
    for model in arguments.model:
        for page in arguments.page:
            for batch in arguments.batch:
                for context in arguments.context:
                    shape = Shape(PAIRS[model], batch, context, page, dtype, device)
                    if device == "cuda" and shape.kv_bytes > torch.cuda.mem_get_info()[0] * 0.4:
                        print(f"skipped: {batch} x {context} does not fit", file=sys.stderr)
                        continue
                    run_shape(arguments, shape, model, peaks, setting)
                    torch._dynamo.reset()


def run_shape(
    arguments: argparse.Namespace, shape: Shape, model: str, peaks: Any, setting: dict[str, Any]
) -> None:
    count = buffer_sets(shape.device, shape.kv_bytes)
    sets = [make_set(shape) for _ in range(count)]
    arms, plan_us = make_arms(sets, shape)
    if arguments.arms:
        arms = [arm for arm in arms if arm.name in arguments.arms]
    if arguments.profile:
        profile(next(arm for arm in arms if arm.name == arguments.profile))
        return
    if arguments.refcheck:
        refcheck(arms, sets[0])
    (time_on_gpu if shape.device == "cuda" else time_on_cpu)(arms, count, arguments.rounds)
    described = {
        "model": model,
        "batch": shape.batch,
        "context": shape.context,
        "page": shape.page,
        "dtype": arguments.dtype,
        "device": shape.device,
    }
    report("block_attention", described, arms, shape.work(), peaks, setting, {"plan_us": plan_us})


if __name__ == "__main__":
    main()
