"""FlashAttention 3 as `sgl_kernel` exports it: SGLang's default attention on Hopper.

The operators `sgl_kernel::fwd` and `sgl_kernel::get_scheduler_metadata` are replaced, so SGLang's
own wrappers, metadata, page tables and buffers run. What the kernel would read from wrong
metadata is an error here: a schedule that was made for other lengths than the launch has, a page
beyond the pool, a batch whose query offsets do not cover the queries.
"""

import torch

from .reference_math import attend
from .table import launch, stand_in

# Ints of the schedule before the lengths: a semaphore, as in hopper/flash_api.cpp.
_HEAD = 1
_DTYPES = (torch.bfloat16, torch.float16)


def forward(
    q,
    k,
    v,
    k_new,
    v_new,
    q_v,
    out,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_k_new,
    seqused_q,
    seqused_k,
    max_seqlen_q,
    max_seqlen_k,
    page_table,
    kv_batch_idx,
    leftpad_k,
    rotary_cos,
    rotary_sin,
    seqlens_rotary,
    q_descale,
    k_descale,
    v_descale,
    softmax_scale,
    is_causal,
    window_size_left,
    window_size_right,
    attention_chunk,
    softcap,
    is_rotary_interleaved,
    scheduler_metadata,
    num_splits,
    pack_gqa,
    sm_margin,
    sinks,
    sparse_mask_fine,
    only_qv,
):
    """Paged attention of ragged queries: q [N, HQ, D], k and v [pages, page, HKV, D].

    Raises:
        NotImplementedError: an argument that SGLang does not use for DFLARE's models.
        ValueError: what the kernel refuses at its launch.
    """
    unused = {
        "k_new": k_new,
        "v_new": v_new,
        "q_v": q_v,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_q": seqused_q,
        "kv_batch_idx": kv_batch_idx,
        "leftpad_k": leftpad_k,
        "rotary_cos": rotary_cos,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "attention_chunk": attention_chunk or None,
        "sinks": sinks,
        "sparse_mask_fine": sparse_mask_fine,
        "only_qv": only_qv or None,
    }
    given = [name for name, value in unused.items() if value is not None]
    if given:
        raise NotImplementedError(f"the stand-in of FlashAttention 3 has no {', '.join(given)}")
    _check_launch(q, k, v, out, cu_seqlens_q, seqused_k, page_table, max_seqlen_q)
    if out is None:
        out = torch.empty_like(q[..., : v.shape[-1]])
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    launch(
        "sgl_kernel::fwd",
        *(q, k, v, out, lse, cu_seqlens_q, seqused_k, page_table, scheduler_metadata),
        *(softmax_scale, is_causal, (window_size_left, window_size_right), softcap),
        max_seqlen_q,
    )
    none = torch.empty(0, dtype=torch.float32, device=q.device)
    return out, lse, none, none


def _check_launch(q, k, v, out, cu_seqlens_q, seqused_k, page_table, max_seqlen_q) -> None:
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"FlashAttention 3 takes bfloat16 and float16, q, k and v alike; got {q.dtype}, "
            f"{k.dtype}, {v.dtype}"
        )
    for name, tensor in (
        ("cu_seqlens_q", cu_seqlens_q),
        ("seqused_k", seqused_k),
        ("page_table", page_table),
    ):
        if tensor is None or tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"FlashAttention 3 takes a dense int32 {name}; got {tensor}")
    batch = len(seqused_k)
    if len(cu_seqlens_q) != batch + 1 or len(page_table) != batch:
        raise ValueError(
            f"FlashAttention 3: {batch} lengths, {len(cu_seqlens_q)} query offsets, "
            f"{len(page_table)} rows of pages"
        )
    if max_seqlen_q is None:
        raise ValueError("FlashAttention 3 takes max_seqlen_q with ragged queries")
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype):
        raise ValueError(f"FlashAttention 3: out is {out.shape} {out.dtype}, q {q.shape} {q.dtype}")


@stand_in("sgl_kernel::fwd", writes="out lse")
def _forward(
    q, k, v, out, lse, offsets, lens, pages, schedule, scale, causal, window, cap, longest
) -> None:
    """Positions end at the last key, as the kernel's bottom-right aligned mask has it."""
    if schedule is not None:
        _check_schedule(schedule, lens)
    starts, page_size = offsets.tolist(), k.shape[1]
    out.zero_()
    for row, length in enumerate(lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        assert end - begin <= longest, (
            f"FlashAttention 3: {end - begin} queries of request {row}, max_seqlen_q {longest}"
        )
        table = pages[row, : -(-length // page_size)].long()
        assert not len(table) or (int(table.min()) >= 0 and int(table.max()) < len(k)), (
            f"FlashAttention 3: request {row} reads page {int(table.max())} of {len(k)}"
        )
        keys, values = (pool[table].flatten(0, 1)[:length] for pool in (k, v))
        query = torch.arange(end - begin)[:, None] + length - (end - begin)
        distance = query - torch.arange(length)[None]
        visible = torch.ones_like(distance, dtype=torch.bool)
        left, right = window[0], 0 if causal else window[1]
        if left >= 0:
            visible &= distance <= left
        if right >= 0:
            visible &= distance >= -right
        result, sums = attend(q[begin:end], keys, values, visible, scale, cap)
        out[begin:end] = result.to(out.dtype)
        lse[:, begin:end] = sums


def scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads,
    num_heads_k,
    headdim,
    headdim_v,
    qkv_dtype,
    seqused_k,
    *_,
    **__,
):
    """The schedule of a launch: here the lengths that it was made for.

    As large as the kernel's: a semaphore and four vectors of the batch, rounded up to four.
    """
    padded = -(-batch_size // 4) * 4
    schedule = torch.empty(_HEAD + 4 * padded, dtype=torch.int32, device=seqused_k.device)
    launch("sgl_kernel::get_scheduler_metadata", schedule, seqused_k)
    return schedule


@stand_in("sgl_kernel::get_scheduler_metadata", writes="schedule")
def _schedule(schedule, lens) -> None:
    schedule.zero_()
    schedule[_HEAD : _HEAD + len(lens)] = lens


def _check_schedule(schedule: torch.Tensor, lens: torch.Tensor) -> None:
    made_for = schedule[_HEAD : _HEAD + len(lens)]
    assert torch.equal(made_for, lens), (
        f"FlashAttention 3: scheduler metadata for lengths {made_for.tolist()}, and the launch "
        f"has {lens.tolist()}"
    )
