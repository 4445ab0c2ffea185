"""Context K/V of a DFlare drafter: fusion, RMSNorm, projection, K-norm, RoPE, paged write."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dflare.ops.reference_math import accumulation_dtype, apply_rope, rms_norm


class ContextWeights(NamedTuple):
    """What a drafter turns target states into K and V with, for all D layers.

    Attributes:
        fusion_probs: [D, T] float32, each row the softmax of the layer's fusion logits.
        norm_weight: [H], RMSNorm weight of the fused state, one for all layers.
        eps: epsilon of that norm.
        kv_weight: [D, 2 * KV * hd, H], rows of the key projection, then of the value projection.
        kv_bias: [D, 2 * KV * hd] or None.
        k_norm_weight: [D, hd], per-head RMSNorm weight of the keys.
        k_norm_eps: epsilon of the K-norm.
    """

    fusion_probs: Tensor
    norm_weight: Tensor
    eps: float
    kv_weight: Tensor
    kv_bias: Tensor | None
    k_norm_weight: Tensor
    k_norm_eps: float


class Pools(NamedTuple):
    """The K and V pools of D layers, each [slots, KV, hd], last two dimensions contiguous."""

    k: Sequence[Tensor]
    v: Sequence[Tensor]


def append_context_kv(
    target_hidden: Tensor,
    weights: ContextWeights,
    cos_sin_cache: Tensor,
    positions: Tensor,
    cache_loc: Tensor,
    commit_lens: Tensor | None,
    block_size: int,
    pools: Pools,
) -> None:
    """Writes the context keys and values of all D draft layers for every valid token.

    Layer d fuses the T tapped target states with its own convex weights, normalises the sum and
    projects it (arXiv 2606.02091, layer-wise fusion; AngelSlim `qwen_dflare.py`).
    With `commit_lens` only row b * block_size + i with i < commit_lens[b] counts: other rows are
    neither written nor read, so they may hold NaN and their `cache_loc` anything.

    Args:
        target_hidden: [N, T * H], float32 or bfloat16 on the CPU, bfloat16 or float16 on CUDA;
            the other weights and the pools have the same dtype unless said otherwise.
        weights: of the drafter.
        cos_sin_cache: [max_pos, rotary] float32, cosines then sines, neox style; rotary <= hd.
        positions: [N] int64, position of each token.
        cache_loc: [N] int64, pool slot of each token.
        commit_lens: [bs] int32, N = bs * block_size; None: all N rows are valid.
        block_size: rows a block; ignored without `commit_lens`.
        pools: where they go.

    Raises:
        RuntimeError: a shape, dtype, device or stride that does not fit; on the CPU also a value
            outside of its table: a position, a slot, a length. CUDA checks no values, as that would
            wait for the device.
    """
    torch.ops.dflare.append_context_kv.default(
        target_hidden,
        *weights,
        cos_sin_cache,
        positions,
        cache_loc,
        commit_lens,
        block_size,
        *pools,
    )


@torch.library.register_fake("dflare::append_context_kv")
def _fake(target_hidden: Tensor, *others: object) -> None:
    return None


def append_context_kv_reference(
    target_hidden: Tensor,
    weights: ContextWeights,
    cos_sin_cache: Tensor,
    positions: Tensor,
    cache_loc: Tensor,
    commit_lens: Tensor | None,
    block_size: int,
    pools: Pools,
) -> None:
    """`append_context_kv` in plain PyTorch, on any device and in any floating dtype."""
    if commit_lens is not None:
        in_block = torch.arange(block_size, device=commit_lens.device)
        valid = (in_block < commit_lens[:, None]).flatten()
        target_hidden, positions, cache_loc = (
            x[valid] for x in (target_hidden, positions, cache_loc)
        )
    w, dtype = weights, target_hidden.dtype
    wide = accumulation_dtype(dtype)
    states = target_hidden.unflatten(1, (w.fusion_probs.shape[1], -1)).to(wide)
    fused = torch.einsum("dt,nth->dnh", w.fusion_probs.to(wide), states)
    kv = torch.bmm(rms_norm(fused, w.norm_weight, w.eps).to(dtype), w.kv_weight.transpose(1, 2))
    if w.kv_bias is not None:
        kv = kv + w.kv_bias[:, None]
    keys, values = kv.unflatten(2, (2, pools.k[0].shape[1], -1)).unbind(2)
    for layer, (k_pool, v_pool) in enumerate(zip(*pools, strict=True)):
        key = rms_norm(keys[layer], w.k_norm_weight[layer], w.k_norm_eps)
        k_pool[cache_loc] = apply_rope(key, cos_sin_cache, positions)
        v_pool[cache_loc] = values[layer]
