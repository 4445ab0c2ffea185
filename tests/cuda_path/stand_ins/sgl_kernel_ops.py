"""Operators of `sgl_kernel`: norms, gate, rotary embedding and FlashAttention 3.

Every other operator of that library on CUDA is replaced by a refusal with its name.
"""

import torch

from . import flash_attention_3
from .reference_math import rms_norm, rotate, silu_and_mul
from .table import TABLE, launch, refuse, stand_in

_LIBRARY = "sgl_kernel"
_implementations = torch.library.Library(_LIBRARY, "IMPL")


@stand_in("sgl_kernel::rmsnorm", writes="out")
def _rms_norm(out, x, weight, eps, pdl) -> None:
    out.copy_(rms_norm(x, weight, eps))


@stand_in("sgl_kernel::fused_add_rmsnorm", writes="x residual")
def _fused_add_rms_norm(x, residual, weight, eps, pdl) -> None:
    total = x.float() + residual.float()
    residual.copy_(total)
    x.copy_(rms_norm(total, weight, eps))


@stand_in("sgl_kernel::silu_and_mul", writes="out")
def _silu_and_mul(out, x) -> None:
    out.copy_(silu_and_mul(x))


@stand_in("sgl_kernel::rotary_embedding", writes="query key")
def _rotary_embedding(positions, query, key, head_size, cos_sin, neox) -> None:
    for x in (query, key):
        if x is not None:
            rotate(x.view(len(x), -1, head_size), cos_sin, positions, neox)


def _fp8_scaled_mm(a, b, scales_a, scales_b, out_dtype, bias=None):
    """[M, K] x [K, N] in FP8, a scale a row of `a` and a column of `b`."""
    out = torch.empty(len(a), b.shape[1], dtype=out_dtype, device=a.device)
    launch("sgl_kernel::fp8_scaled_mm", out, a, b, scales_a, scales_b, bias)
    return out


@stand_in("sgl_kernel::fp8_scaled_mm", writes="out")
def _scaled_product(out, a, b, scales_a, scales_b, bias) -> None:
    product = (a.float() * scales_a.view(-1, 1)) @ (b.float() * scales_b.view(1, -1))
    out.copy_(product if bias is None else product + bias.float())


def install() -> None:
    """Give every CUDA operator of `sgl_kernel` a stand-in or a refusal."""
    import sgl_kernel
    import sgl_kernel.elementwise
    import sgl_kernel.flash_attn

    # Its norms would go to FlashInfer's kernels instead of the operators of this table.
    sgl_kernel.elementwise._has_flashinfer = False
    special = {
        "sgl_kernel::fwd": flash_attention_3.forward,
        "sgl_kernel::fp8_scaled_mm": _fp8_scaled_mm,
        "sgl_kernel::get_scheduler_metadata": flash_attention_3.scheduler_metadata,
    }
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith(f"{_LIBRARY}::"):
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            continue
        if name in special:
            implementation = special[name]
        elif name in TABLE:
            implementation = _launcher(name)
        else:
            implementation = _refusal(name)
        _implementations.impl(name, implementation, "CUDA", allow_override=True)


def _launcher(name: str):
    return lambda *args: launch(name, *args)


def _refusal(name: str):
    return lambda *args, **kwargs: refuse(name)
