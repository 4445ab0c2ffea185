"""Layers of any model on the CPU platform, on this package's own operators.

Library GEMMs are tuned for many rows; decoding has one row a request and verification a block. A
row also keeps its bits whatever stands beside it, so that a prefill in chunks, a decode step and a
verification give a token the same logits. Norms, gates and rotary embeddings take one operator
each where SGLang's own code for a CPU takes ten: at these sizes calls cost more than arithmetic.
"""

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.rotary_embedding import RotaryEmbedding

from dflare import ops

_DTYPES = (torch.float32, torch.bfloat16)


class CpuLinearMethod(UnquantizedLinearMethod):
    """`UnquantizedLinearMethod` with this package's kernel."""

    def apply(self, layer, x, bias=None):
        return ops.any_linear(x, layer.weight, bias)


class CpuEmbeddingMethod(UnquantizedEmbeddingMethod):
    """`UnquantizedEmbeddingMethod` with this package's kernel where it serves as a head."""

    def apply(self, layer, x, bias=None):
        return ops.any_linear(x, layer.weight, bias)


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


def register_cpu_forwards(dispatch_key: str) -> None:
    """Register forwards of SGLang's layer classes for an out-of-tree platform.

    Args:
        dispatch_key: the platform's `get_dispatch_key_name()`.
    """
    for layer, forward in (
        (RMSNorm, _rms_norm),
        (SiluAndMul, _silu_and_mul),
        (RotaryEmbedding, _rotary_embedding),
    ):
        BaseFusedOp.register_oot_forward(layer, forward, dispatch_key)


def is_plain_norm(norm: RMSNorm, dtype: torch.dtype) -> bool:
    """Whether a norm is what `ops.add_rms_norm` computes, for inputs of a dtype."""
    special = (
        norm.variance_size_override
        or norm.cast_x_before_out_mul
        or norm.fp32_residual
        or norm.override_orig_dtype
    )
    return not special and dtype in _DTYPES and norm.weight.dtype == dtype


def _rms_norm(self, x, residual=None, post_residual_addition=None, quant_linear=None):
    plain = is_plain_norm(self, x.dtype) and post_residual_addition is None
    # DFLASH's residual begins with embeddings that SGLang has rounded to bfloat16.
    if not plain or (residual is not None and residual.dtype != x.dtype):
        return self.forward_native(x, residual, post_residual_addition, quant_linear)
    rows = x.reshape(-1, x.shape[-1])
    # Like SGLang's fused kernels, the sum is written over the residual.
    before = None if residual is None else residual.view(rows.shape)
    out = ops.add_rms_norm(rows, before, self.weight, self.variance_epsilon).view(x.shape)
    return out if residual is None else (out, residual)


def _silu_and_mul(self, x):
    if x.dtype not in _DTYPES:
        return self.forward_native(x)
    width = x.shape[-1]
    return ops.silu_and_mul(x.reshape(-1, width)).view(*x.shape[:-1], width // 2)


def _rotary_embedding(self, positions, query, key, offsets=None, fused_set_kv_buffer_arg=None):
    whole = self.is_neox_style and self.cos_sin_cache.dtype == torch.float32
    if not whole or offsets is not None or query.dtype not in _DTYPES:
        return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    positions = positions.flatten().long()
    if not len(positions):
        return query, key  # an empty batch, of which no view can tell the width
    for x in (query, key):
        ops.rotate_heads(x.view(len(positions), -1), self.cos_sin_cache, positions, self.head_size)
    return query, key
