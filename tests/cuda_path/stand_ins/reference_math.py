"""Norms, gates and rotary embeddings in float32, rounded once at the end like the kernels."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., H] in any dtype -> float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """[..., 2 * I], gate first -> [..., I] float32."""
    gate, up = x.float().chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def rotate(heads: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, neox: bool) -> None:
    """Rotate [N, heads, D] in place by `cos_sin[positions]`, [N, rotary] with cosines first."""
    cos, sin = (part[:, None] for part in cos_sin[positions.long()].float().chunk(2, -1))
    rotary = 2 * cos.shape[-1]
    x = heads[..., :rotary].float()
    a, b = x.chunk(2, -1) if neox else (x[..., ::2], x[..., 1::2])
    turned = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.cat(turned, -1) if neox else torch.stack(turned, -1).flatten(-2)
    heads[..., :rotary] = joined.to(heads.dtype)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request.

    Args:
        q: [M, HQ, D]; k: [N, HKV, D]; v: [N, HKV, Dv].
        visible: [M, N] bool.
        cap: soft cap of the scores, 0 for none.

    Returns:
        [M, HQ, Dv] float32, zero where nothing is visible, and the log sum of exponentials
        [HQ, M].
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->hmn", q.float(), k) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num()
    return torch.einsum("hmn,nhd->mhd", weights, v), torch.logsumexp(scores, -1)
