"""All layers of a Llama- or Qwen-like target on the CPU, as one operator."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dflare.ops.paged_context import PagedContext


class DecoderWeights(NamedTuple):
    """Weights of L layers and of the norm behind them, all of one dtype and contiguous.

    Attributes:
        norms: 2 L + 1 of [hidden]: before attention and before the gates of each layer, then last.
        matrices: 4 L: queries, keys and values in one [(HQ + 2 KV) * hd, hidden]; the output's
            [hidden, HQ * hd]; gates and values [2 * wide, hidden]; [hidden, wide].
        biases: L of [(HQ + 2 KV) * hd], of the first matrices; or none.
        head_norms: 2 L of [hd], of queries and keys of each layer; or none.
        eps: of all norms.
    """

    norms: Sequence[Tensor]
    matrices: Sequence[Tensor]
    biases: Sequence[Tensor]
    head_norms: Sequence[Tensor]
    eps: float


def decoder_layers(
    embedded: Tensor,
    weights: DecoderWeights,
    cos_sin_cache: Tensor,
    positions: Tensor,
    pools: Sequence[Tensor],
    cache_loc: Tensor,
    context: PagedContext,
    query_start: Tensor,
    *,
    window: int,
    scale: float,
    logit_cap: float,
    parents: Tensor | None = None,
    taps: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Run a batch through all layers; keys and values of its tokens go into the pools.

    It computes what `add_rms_norm`, `linear`, `rotate_heads`, `paged_attention` and `silu_and_mul`
    compute one after the other, to the bit.

    Args:
        embedded: [rows, hidden], float32 or bfloat16, contiguous; overwritten.
        weights: of the layers; hidden, HQ * hd and wide are multiples of 32.
        cos_sin_cache: [max_pos, rotary] float32, as for `rotate_heads`.
        positions: [rows] int64.
        pools: 2 L of [slots, KV, hd]: keys of each layer, then values; written in place.
        cache_loc: [rows] int64, slots of the rows.
        context: as for `paged_attention`, lengths with the queries; its pools are not looked at.
        query_start: [bs + 1], as for `paged_attention`; all rows are queries.
        window, scale, logit_cap, parents: as for `paged_attention`.
        taps: layers whose inputs, after the residual's addition, are kept.

    Returns:
        [rows, hidden] behind the last norm, and the taps, [rows, len(taps) * hidden].

    Raises:
        RuntimeError: a shape, dtype, device, stride, slot or position that does not fit.
    """
    return torch.ops.dflare.decoder_layers.default(
        embedded,
        *weights,
        cos_sin_cache,
        positions,
        pools,
        cache_loc,
        *context[2:],
        query_start,
        window,
        scale,
        logit_cap,
        parents,
        taps,
    )
