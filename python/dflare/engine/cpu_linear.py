"""Linear layers and heads of the CPU platform on `dflare.ops.linear`.

Library GEMMs are tuned for many rows; decoding has one row a request and verification a block. A
row also keeps its bits whatever stands beside it, so that a prefill in chunks, a decode step and a
verification give a token the same logits.
"""

import torch
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)

from dflare import ops


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous():
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    return ops.linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


class CpuLinearMethod(UnquantizedLinearMethod):
    """`UnquantizedLinearMethod` with this package's kernel."""

    def apply(self, layer, x, bias=None):
        return _linear(x, layer.weight, bias)


class CpuEmbeddingMethod(UnquantizedEmbeddingMethod):
    """`UnquantizedEmbeddingMethod` with this package's kernel where it serves as a head."""

    def apply(self, layer, x, bias=None):
        return _linear(x.to(layer.weight.dtype), layer.weight, bias)


_METHODS: dict[type, type] = {
    UnquantizedLinearMethod: CpuLinearMethod,
    UnquantizedEmbeddingMethod: CpuEmbeddingMethod,
}


def use_cpu_linear(model: torch.nn.Module) -> None:
    """Give every unquantized linear layer and embedding of `model` this package's kernel."""
    for module in model.modules():
        method = _METHODS.get(type(getattr(module, "quant_method", None)))
        if method is not None:
            module.quant_method = method()


def greedy_tokens(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Most probable token of each row, [rows] int64.

    Args:
        hidden: [rows, H] final hidden states.
        head: [vocabulary, H], all of the target's head.
    """
    return _linear(hidden, head, None).argmax(-1)
