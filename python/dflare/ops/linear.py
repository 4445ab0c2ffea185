"""Linear layers of few rows on the CPU: decoding, drafting and verification."""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` for few rows: weights are read once for all of them.

    A row's result has the same bits whatever rows stand beside it, so that a target gives a token
    the same logits in a decode step and in a verification. For many rows (prefill) a library GEMM
    is faster.

    Args:
        x: [..., inputs], float32 or bfloat16, at least two dimensions; rows contiguous.
        weight: [outputs, inputs], dtype of x, contiguous.
        bias: [outputs], dtype of x, or none.

    Returns:
        [..., outputs] in x's dtype; sums are float32.

    Raises:
        RuntimeError: a shape, dtype, device or stride that does not fit.
    """
    rows = x.flatten(0, -2) if x.dim() > 2 else x
    out = torch.ops.dflare.linear.default(rows, weight, bias)
    return out.view(*x.shape[:-1], out.shape[-1])


def any_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of a layer as a model has it; Torch's own where the operator has no kernel for it.

    Args:
        x: [..., inputs] of any dtype; it is converted to that of `weight`.
        weight: [outputs, inputs] on the CPU, of any dtype and strides.
        bias: [outputs], dtype of `weight`, or none.

    Returns:
        [..., outputs] in the dtype of `weight`.
    """
    x = x.to(weight.dtype)
    if weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous():
        return torch.nn.functional.linear(x, weight, bias)
    return linear(x, weight, bias)


@torch.library.register_fake("dflare::linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
