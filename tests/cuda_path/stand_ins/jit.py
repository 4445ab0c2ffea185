"""SGLang's own kernels, which it compiles when they are first used (`load_jit`).

A module is asked for by a marker and exports functions; `jit::MARKER.EXPORT` is the name in the
table.
"""

import sys

import torch

from .reference_math import rms_norm, rotate, silu_and_mul
from .table import TABLE, launch, refuse, stand_in


class _Module:
    """What `load_jit` returns: exports that launch stand-ins."""

    def __init__(self, marker: str) -> None:
        self._marker = marker

    def __getattr__(self, export: str):
        if export.startswith("__"):
            raise AttributeError(export)
        name = f"jit::{self._marker}.{export}"
        if name not in TABLE:
            refuse(name)
        return lambda *args: launch(name, *args)


def _load_jit(marker, *_args, **_kwargs) -> _Module:
    return _Module(marker)


def install() -> None:
    """Replace the compiler in SGLang's loader, before a kernel module takes it by name."""
    import sglang.kernels.jit.utils.compile.loader

    original = sglang.kernels.jit.utils.compile.loader.load_jit
    for module in list(sys.modules.values()):
        if getattr(module, "load_jit", None) is original:
            module.load_jit = _load_jit  # type: ignore[attr-defined]


@stand_in("jit::fused_rope.run_rope", writes="q k")
def _rope(q, k, cos_sin, positions) -> None:
    for x in (q, k):
        heads = x if x.dim() == 3 else x.view(len(x), -1, cos_sin.shape[-1])
        rotate(heads, cos_sin, positions, neox=True)


@stand_in("jit::fused_rope.run_rope_store", writes="q k k_cache v_cache")
def _rope_store(q, k, v, k_cache, v_cache, cos_sin, positions, slots) -> None:
    _rope(q, k, cos_sin, positions)
    _check_slots(slots, len(k_cache))
    k_cache[slots.long()] = k.flatten(1).to(k_cache.dtype)
    v_cache[slots.long()] = v.flatten(1).to(v_cache.dtype)


@stand_in("jit::rotary_embedding.rotary_embedding", writes="query key")
def _rotary_embedding(positions, query, key, head_size, cos_sin, neox) -> None:
    for x in (query, key):
        if x is not None:
            rotate(x.view(len(x), -1, head_size), cos_sin, positions, neox)


@stand_in("jit::kvcache.store_cache", writes="k_cache v_cache")
def _store_cache(k, v, k_cache, v_cache, slots, size, skipped) -> None:
    _check_slots(slots, size)
    kept = slots != skipped
    k_cache[slots[kept].long()] = k[kept].to(k_cache.dtype)
    v_cache[slots[kept].long()] = v[kept].to(v_cache.dtype)


def _check_slots(slots: torch.Tensor, size: int) -> None:
    assert bool(((slots >= 0) & (slots < size)).all()), (
        f"a kernel writes K/V to slots {slots.tolist()} of {size}"
    )


@stand_in("jit::activation.run_activation", writes="out")
def _activation(x, out, kind) -> None:
    if kind != "silu":
        raise NotImplementedError(f"the stand-in of jit::activation has no {kind}")
    out.copy_(silu_and_mul(x))


@stand_in("jit::qknorm.qknorm", writes="q k")
def _qk_norm(q, k, q_weight, k_weight, eps) -> None:
    q.copy_(rms_norm(q, q_weight, eps))
    k.copy_(rms_norm(k, k_weight, eps))


@stand_in("jit::rmsnorm.rmsnorm", writes="out")
def _rms_norm(x, weight, out, eps) -> None:
    out.copy_(rms_norm(x, weight, eps))


@stand_in("jit::fused_add_rmsnorm.fused_add_rmsnorm", writes="x residual")
def _fused_add_rms_norm(x, residual, weight, eps) -> None:
    total = x.float() + residual.float()
    residual.copy_(total)
    x.copy_(rms_norm(total, weight, eps))


@stand_in("jit::per_token_quant_fp8.per_token_quant_fp8", writes="quantised scales")
def _per_token_quant_fp8(x, quantised, scales) -> None:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    scales.copy_(scale)
    quantised.copy_((x.float() / scale).to(quantised.dtype))


@stand_in("jit::clamp_position.clamp_position", writes="out")
def _clamp_position(out, seq_lens) -> None:
    out.copy_((seq_lens - 1).clamp(min=0))


@stand_in("jit::speculative_sampling.sample", writes="predicts accept_index accepted draft")
def _sample_chain(
    predicts,
    accept_index,
    accepted,
    candidates,
    index,
    next_token,
    next_sibling,
    coins,
    final_coins,
    target,
    draft,
    threshold_single,
    threshold_acc,
) -> None:
    """Speculative sampling against point masses, for chains: a node has no sibling.

    A drafted token x is kept with its target probability p(x). The first one that is not is
    replaced by a sample of the target without x; after a whole block one more is sampled.
    """
    assert bool((next_sibling == -1).all()), "the stand-in of speculative sampling takes chains"
    last_slot = accept_index.shape[1] - 1
    for b, block in enumerate(candidates.tolist()):
        kept = 0
        accept_index[b, 0] = index[b, 0]
        while kept < last_slot:
            p = float(target[b, kept, block[kept + 1]])
            if float(coins[b, kept]) > p / threshold_acc and p < threshold_single:
                break
            predicts[int(index[b, kept])] = block[kept + 1]
            kept += 1
            accept_index[b, kept] = index[b, kept]
        rest = target[b, kept].clone()
        if kept < last_slot:
            draft[b, kept, block[kept + 1]] = rest[block[kept + 1]]
            rest[block[kept + 1]] = 0
        sums = rest.cumsum(0)
        predicts[int(index[b, kept])] = int(
            (sums > float(final_coins[b]) * sums[-1]).int().argmax()
        )
        accepted[b] = kept
