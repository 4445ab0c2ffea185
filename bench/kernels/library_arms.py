"""FlashAttention 3 and FlashInfer as arms of the block_attention benchmark: attention alone."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from attention_arms import ATTENTION_ONLY, BlockInputs, Shape
from measure import Arm
from torch import Tensor

WORKSPACE_BYTES = 512 << 20  # as SGLang gives FlashInfer for large models


def page_tables(inputs: BlockInputs) -> list[Tensor]:
    """Page of each of a request's pages, [batch, pages] int32."""
    page = inputs.shape.page
    return [(x["req_to_token"][:, ::page] // page).contiguous() for x in inputs.sets]


def pools_of(x: dict[str, Any], shape: Shape) -> tuple[Tensor, Tensor]:
    """[pages, page, KV, hd] each."""
    paged = (-1, shape.page, shape.pair.kv_heads, shape.pair.head_dim)
    return x["k_pool"].view(paged), x["v_pool"].view(paged)


def fa3_arm(inputs: BlockInputs) -> Arm:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache, is_fa3_supported

    if not is_fa3_supported():
        major, minor = torch.cuda.get_device_capability()
        raise NotImplementedError(f"SGLang has no FA3 kernels for sm_{major}{minor}")
    shape, queries, tables = inputs.shape, inputs.queries, page_tables(inputs)
    pair, device = shape.pair, shape.device
    lens = torch.full((shape.batch,), shape.context + pair.block, device=device).int()
    starts = torch.arange(shape.batch + 1, device=device).int() * pair.block

    def run(i: int) -> Tensor:
        k_cache, v_cache = pools_of(inputs.sets[i], shape)
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

    return Arm("fa3", run, shape.work(), note=ATTENTION_ONLY)


class Pages:
    """A buffer set's pages as FlashInfer wants them, all int32 on the device."""

    def __init__(self, table: Tensor, shape: Shape) -> None:
        pages_each = shape.tokens // shape.page
        counts = torch.arange(shape.batch + 1, device=shape.device).int()
        last = (shape.context + shape.pair.block - 1) % shape.page + 1
        self.query_starts = counts * shape.pair.block
        self.starts = counts * pages_each
        self.indices = table.flatten()
        self.last = torch.full((shape.batch,), last, device=shape.device).int()


Plan = Callable[[], None]


def plan_arguments(pages: Pages, shape: Shape) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What both wrappers' `plan` take, in place and by name."""
    pair = shape.pair
    sizes = (pair.heads, pair.kv_heads, pair.head_dim, shape.page)
    named = {
        "sm_scale": pair.head_dim**-0.5,
        "q_data_type": shape.dtype,
        "kv_data_type": shape.dtype,
    }
    return (pages.starts, pages.indices, pages.last, *sizes), named


def prefill_wrapper(
    backend: str, flashinfer: Any, workspace: Tensor, pages: Pages, shape: Shape
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
    positional, named = plan_arguments(pages, shape)
    return wrapper, lambda: wrapper.plan(pages.query_starts, *positional, causal=False, **named)


def uniform_wrapper(
    flashinfer: Any, workspace: Tensor, pages: Pages, shape: Shape
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
    positional, named = plan_arguments(pages, shape)
    return wrapper, lambda: wrapper.plan(*positional, q_len_per_req=shape.pair.block, **named)


def flashinfer_arm(name: str, make: Callable[..., tuple[Any, Plan]], inputs: BlockInputs) -> Arm:
    """One wrapper a set, planned before; they share the workspace, for they never overlap."""
    import flashinfer

    shape, queries = inputs.shape, inputs.queries
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
    wrappers, plan_us = [], []
    for table in page_tables(inputs):
        wrapper, plan = make(flashinfer, workspace, Pages(table, shape), shape)
        plan()  # the first of all compiles the kernel
        torch.cuda.synchronize()
        start = time.perf_counter()
        plan()
        plan_us.append((time.perf_counter() - start) * 1e6)
        wrappers.append(wrapper)

    def run(i: int) -> Tensor:
        return wrappers[i].run(queries[i], pools_of(inputs.sets[i], shape)).flatten(1)

    planned = statistics.median(plan_us)
    return Arm(name, run, shape.work(), note=ATTENTION_ONLY, plan_us=planned)


def library_makers(inputs: BlockInputs) -> dict[str, Callable[[], Arm]]:
    wrappers: dict[str, Callable[..., tuple[Any, Plan]]] = {
        "flashinfer_fa2": functools.partial(prefill_wrapper, "fa2"),
        "flashinfer_fa3": functools.partial(prefill_wrapper, "fa3"),
        "flashinfer_uniform": uniform_wrapper,
    }
    makers: dict[str, Callable[[], Arm]] = {"fa3": lambda: fa3_arm(inputs)}
    for name, make in wrappers.items():
        makers[name] = functools.partial(flashinfer_arm, name, make, inputs)
    return makers
