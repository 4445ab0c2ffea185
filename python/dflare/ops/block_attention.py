"""Attention of a draft block: over the paged context and over the block itself."""

from typing import NamedTuple

import torch
from torch import Tensor

from dflare.ops.paged_context import PagedContext
from dflare.ops.reference_math import apply_rope, attend, rms_norm, visibility


class BlockNorms(NamedTuple):
    """The per-head RMSNorms of queries and keys: weights [hd] of qkv's dtype, one epsilon."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float


def block_attention(
    qkv: Tensor,
    norms: BlockNorms,
    cos_sin_cache: Tensor,
    positions: Tensor,
    context: PagedContext,
    block_size: int,
    window: int,
    causal: bool,
    scale: float,
    schedule: Tensor | None = None,
) -> Tensor:
    """Normalises and rotates the block's q and k, then attends over context and block.

    The block's keys and values come from `qkv` and never touch the pool, which is read only at
    context indices below `seq_lens[b]` (arXiv 2606.02091, block-parallel drafting).
    On CUDA everything but `qkv` must be older than the kernel that made `qkv`: the schedule and the
    context are read while that kernel still runs (programmatic dependent launch).
    Block token i has index seq_lens[b] + i; key j is visible to query i iff
    (window < 0 or j >= i - window) and (not causal or j <= i), indices, not positions.

    Args:
        qkv: [bs * B, (HQ + 2 * KV) * hd], query heads, key heads, value heads; float32 or
            bfloat16 on the CPU, bfloat16 or float16 on CUDA; rows may have any stride.
        norms: of q and k.
        cos_sin_cache: [max_pos, rotary] float32, cosines then sines, neox style; rotary <= hd.
        positions: [bs * B] int64, used for RoPE only.
        context: pools in qkv's dtype; lengths before the block, may be 0.
        block_size: B, tokens a block.
        window: sliding window in tokens, negative for none.
        causal: whether later tokens of the block are hidden from earlier ones.
        scale: factor of the logits, usually hd ** -0.5.
        schedule: of `block_attention_schedule`, on CUDA; None on the CPU.

    Returns:
        [bs * B, HQ * hd] in qkv's dtype.

    Raises:
        RuntimeError: a shape, dtype, device or stride that does not fit; on the CPU also a value
            outside of its table: a position, a slot, a length. CUDA checks no values, as that would
            wait for the device.
    """
    settings = (block_size, window, causal, scale, schedule)
    return torch.ops.dflare.block_attention.default(
        qkv, *norms, cos_sin_cache, positions, *context, *settings
    )


@torch.library.register_fake("dflare::block_attention")
def _fake(qkv, q_norm_weight, k_norm_weight, eps, cos_sin_cache, positions, k_pool, *others):
    kv_width = 2 * k_pool.shape[1] * k_pool.shape[2]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - kv_width)


def block_attention_schedule(
    seq_lens: Tensor,
    block_size: int,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
) -> Tensor:
    """Cuts a batch's contexts into parts of about equal length for the thread blocks of CUDA.

    Made once a step, on the device and without waiting for it, and shared by all layers of one
    shape. It says only how many parts a request has: one made for other lengths, another window or
    another batch costs balance, never correctness. A call of `block_attention` draws tickets in it
    and puts them back, so calls that share one must follow one another on one stream.

    Args:
        seq_lens: [bs] int64 or int32 on CUDA, context length before the block.
        block_size, num_heads, kv_heads, head_dim: shape of the `block_attention` calls, HQ and KV
            as this rank has them.
        window: their sliding window in tokens, negative for none.

    Returns:
        int32, the argument `schedule` of `block_attention`; its size depends on the shape and the
        device alone.

    Raises:
        RuntimeError: a shape or device that the kernels do not support.
    """
    return torch.ops.dflare.block_attention_schedule.default(
        seq_lens, block_size, num_heads, kv_heads, head_dim, window
    )


@torch.library.register_fake("dflare::block_attention_schedule")
def _fake_schedule(seq_lens: Tensor, *shape: int) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return seq_lens.new_empty(size, dtype=torch.int32)


def block_attention_reference(
    qkv: Tensor,
    norms: BlockNorms,
    cos_sin_cache: Tensor,
    positions: Tensor,
    context: PagedContext,
    block_size: int,
    window: int,
    causal: bool,
    scale: float,
    schedule: Tensor | None = None,
    operand_dtype: torch.dtype | None = None,
) -> Tensor:
    """`block_attention` in plain PyTorch, on any device and in any floating dtype.

    Rotated q and k are rounded to `operand_dtype` if it is given, as tensor cores need them.
    """
    kv_heads, head_dim = context.k_pool.shape[1:]
    heads = qkv.unflatten(1, (-1, head_dim))
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    q = apply_rope(rms_norm(q, norms.q_weight, norms.eps), cos_sin_cache, positions)
    k = apply_rope(rms_norm(k, norms.k_weight, norms.eps), cos_sin_cache, positions)
    if operand_dtype is not None:
        q, k = (x.to(operand_dtype).to(qkv.dtype) for x in (q, k))
    out = torch.empty_like(q)
    for request, length in enumerate(context.seq_lens.tolist()):
        block = slice(request * block_size, (request + 1) * block_size)
        slots = context.slots(request, length)
        index = torch.arange(length + block_size, device=qkv.device)
        out[block] = attend(
            q[block],
            torch.cat((context.k_pool[slots], k[block])),
            torch.cat((context.v_pool[slots], v[block])),
            visibility(index[length:], index, window, causal),
            scale,
        )
    return out.flatten(1)
