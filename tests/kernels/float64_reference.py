"""The two ops in float64, in the fewest lines: what every CUDA result is held against."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Neox rotation of x [n, heads, head_dim] by cos_sin [n, rotary]."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def context_kv(
    target_hidden: Tensor,
    fusion_probs: Tensor,
    norm_weight: Tensor,
    eps: float,
    kv_weight: Tensor,
    kv_bias: Tensor | None,
    k_norm_weight: Tensor,
    k_norm_eps: float,
    cos_sin_cache: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """K and V [D, n, kv_heads, head_dim] of n tokens."""
    taps = fusion_probs.shape[1]
    hidden = target_hidden.double().unflatten(-1, (taps, -1))
    fused = torch.einsum("dt,nth->dnh", fusion_probs.double(), hidden)
    fused = rms_norm(fused, norm_weight.double(), eps)
    kv = fused @ kv_weight.double().transpose(1, 2)
    if kv_bias is not None:
        kv = kv + kv_bias.double()[:, None]
    k, v = kv.unflatten(-1, (2, -1, k_norm_weight.shape[-1])).unbind(2)
    k = rms_norm(k, k_norm_weight.double()[:, None, None], k_norm_eps)
    cos_sin = cos_sin_cache[positions].double()
    return torch.stack([rope(layer, cos_sin) for layer in k]), v


def valid_rows(commit_lens: Tensor | None, block_size: int, rows: int) -> Tensor:
    """Indices of the rows that count."""
    if commit_lens is None:
        return torch.arange(rows)
    index = torch.arange(block_size)
    return (index < commit_lens[:, None].cpu()).flatten().nonzero().flatten()


def block_attention(
    qkv: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    eps: float,
    cos_sin_cache: Tensor,
    positions: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    block_size: int,
    window: int,
    causal: bool,
    scale: float,
    operand_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """operand_dtype: what normalised and rotated q and k are rounded to.

    Any implementation on tensor cores rounds them to the element type, which moves a logit by up to
    2^-9 of its size; where logits are large, only a reference that rounds too can be close.
    """
    kv_heads, head_dim = k_pool.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    qkv = qkv.double().unflatten(-1, (-1, head_dim))
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    cos_sin = cos_sin_cache[positions].double()
    q = rope(rms_norm(q, q_norm_weight.double(), eps), cos_sin)
    k = rope(rms_norm(k, k_norm_weight.double(), eps), cos_sin)
    q, k = q.to(operand_dtype).double(), k.to(operand_dtype).double()
    out = []
    for b, length in enumerate(seq_lens.tolist()):
        rows = slice(b * block_size, (b + 1) * block_size)
        slots = req_to_token[req_pool_indices[b], :length].long()
        keys = torch.cat([k_pool[slots].double(), k[rows]])
        values = torch.cat([v_pool[slots].double(), v[rows]])
        group = heads // kv_heads
        scores = torch.einsum("ihd,jhd->hij", q[rows], keys.repeat_interleave(group, 1)) * scale
        i = torch.arange(length, length + block_size, device=qkv.device)[:, None]
        j = torch.arange(length + block_size, device=qkv.device)[None]
        hidden = torch.zeros_like(i + j, dtype=torch.bool)
        if window >= 0:
            hidden |= j < i - window
        if causal:
            hidden |= j > i
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(torch.einsum("hij,jhd->ihd", weights, values.repeat_interleave(group, 1)))
    return torch.cat(out).flatten(1)


def worst_row_error(out: Tensor, reference: Tensor) -> float:
    """Largest |out - reference| / |reference| of a head of a token; NaN counts as inf."""
    error = (out.double() - reference).norm(dim=-1) / reference.norm(dim=-1)
    return error.nan_to_num(nan=float("inf")).max().item()
