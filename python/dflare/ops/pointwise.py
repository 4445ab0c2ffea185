"""What lies between the matrix products of a transformer layer, on the CPU: one pass each."""

import torch
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of `x + residual`; the sum replaces `residual`.

    Args:
        x: [rows, hidden], float32 or bfloat16; rows contiguous.
        residual: [rows, hidden] like x, modified in place, or none.
        weight: [hidden], dtype of x.
        eps: added to the mean of squares.

    Returns:
        [rows, hidden] in x's dtype; sums are float32.

    Raises:
        RuntimeError: a shape, dtype, device or stride that does not fit.
    """
    return torch.ops.dflare.add_rms_norm.default(x, residual, weight, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves of each row, as in SwiGLU.

    Args:
        x: [rows, 2 * width], float32 or bfloat16, gate before up; rows contiguous.

    Returns:
        [rows, width] in x's dtype.

    Raises:
        RuntimeError: a shape, dtype, device or stride that does not fit.
    """
    return torch.ops.dflare.silu_and_mul.default(x)


def rotate_heads(x: Tensor, cos_sin_cache: Tensor, positions: Tensor, head_dim: int) -> None:
    """Apply rotary embedding (neox style) to every head of every row, in place.

    Args:
        x: [rows, heads * head_dim], float32 or bfloat16; rows contiguous, modified in place.
        cos_sin_cache: [max_pos, rotary] float32, rotary / 2 cosines, then as many sines.
        positions: [rows] int64, rows of `cos_sin_cache`.
        head_dim: elements a head; those from `rotary` on stay as they are.

    Raises:
        RuntimeError: a shape, dtype, device, stride or position that does not fit.
    """
    torch.ops.dflare.rotate_heads.default(x, cos_sin_cache, positions, head_dim)


@torch.library.register_fake("dflare::add_rms_norm")
def _fake_add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("dflare::silu_and_mul")
def _fake_silu_and_mul(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.register_fake("dflare::rotate_heads")
def _fake_rotate_heads(x: Tensor, cos_sin_cache: Tensor, positions: Tensor, head_dim: int) -> None:
    return None
