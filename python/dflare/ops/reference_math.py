"""The few formulas that the operators' references share."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in the accumulation dtype, returned in x's."""
    wide = x.to(accumulation_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(x.dtype)


def apply_rope(x: Tensor, cos_sin_cache: Tensor, positions: Tensor) -> Tensor:
    """Rotates the first `rotary` channels of each head, neox style (halves, not pairs).

    Args:
        x: [N, heads, head_dim].
        cos_sin_cache: [max_pos, rotary], cosines in the first half and sines in the second.
        positions: [N] int64.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    rotary = cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache[positions].to(wide.dtype)[:, None].chunk(2, dim=-1)
    first, second = wide[..., :rotary].chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin, wide[..., rotary:])
    return torch.cat(rotated, dim=-1).to(x.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, logit_cap: float = 0.0
) -> Tensor:
    """Softmax attention of one request with grouped KV heads, in the accumulation dtype.

    Args:
        q: [queries, HQ, hd].
        k, v: [keys, KV, hd]; HQ is a multiple of KV.
        visible: [queries, keys] bool.
        scale: factor of the logits.
        logit_cap: when positive, logits become cap * tanh(logits / cap).

    Returns:
        [queries, HQ, hd] in q's dtype.
    """
    wide = accumulation_dtype(q.dtype)
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k) * scale
    if logit_cap > 0:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    probs = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", probs, v).to(q.dtype)


def visibility(query_index: Tensor, key_index: Tensor, window: int, causal: bool) -> Tensor:
    """[queries, keys] bool: key j is visible to query i iff j >= i - window and, if causal, j <= i.

    A negative window means none.
    """
    distance = query_index[:, None] - key_index[None, :]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if window >= 0:
        visible &= distance <= window
    if causal:
        visible &= distance >= 0
    return visible
