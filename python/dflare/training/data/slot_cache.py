"""A K/V cache for transformers models in which every row of the batch is at its own length.

transformers' static cache advances all rows together, so a batch waits for its longest answer and
a verified block that is rejected in one row would have to be taken back there alone. Here each
token says which position it takes: finished rows are refilled while others go on, and rejected
tokens are simply overwritten.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

from dflare.errors import UnsupportedError
from dflare.ops.paged_attention import paged_attention
from dflare.ops.paged_context import PagedContext

ATTENTION = "dflare_grouped"


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention that reads each cached K/V head once for its whole group of query heads.

    transformers' own functions repeat K/V for every query head when there is a mask, which is
    most of the time of a batched decoding step.

    Args:
        module: The attention layer; not used, part of transformers' interface.
        query: ``[N, HQ, Q, hd]``.
        key: ``[N, KV, L, hd]``.
        value: ``[N, KV, L, hd]``.
        attention_mask: ``[N, 1, Q, L]`` bool; none for causal attention over the Q new tokens.
        scaling: Factor of the scores.
        kwargs: What else the model passes.

    Returns:
        ``[N, Q, HQ, hd]`` and none, as transformers expects.

    Raises:
        UnsupportedError: A model whose attention has sinks, capped logits or a window in reach.
    """
    window = kwargs.get("sliding_window")
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None or (window or 2**62) < key.shape[2]:
        raise UnsupportedError(
            "the target's attention has sinks, capped logits or a sliding window shorter than "
            f"{key.shape[2]} tokens, which this generator does not compute; use an SGLang server "
            "(--server) to generate, and the model's own attention to train "
            "(target.attention: sdpa or eager)"
        )
    if attention_mask is None:
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=True
        )
        return attended.transpose(1, 2), None
    in_slots = query.device.type == "cpu" and key.is_contiguous() and key.shape[3] % 16 == 0
    if in_slots and query.shape[2] == 1:
        return _attend_to_slots(query, key, value, attention_mask, scaling), None
    rows, heads, tokens, head_dim = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(rows, key.shape[1], groups * tokens, head_dim)
    scores = (packed @ key.transpose(2, 3)).float() * scaling
    scores = scores.unflatten(2, (groups, tokens))
    scores = scores.masked_fill(~attention_mask[:, :, None], float("-inf"))
    probabilities = scores.softmax(-1).to(value.dtype).flatten(2, 3)
    attended = (probabilities @ value).unflatten(2, (groups, tokens))
    return attended.permute(0, 3, 1, 2, 4).flatten(2, 3), None


@lru_cache(maxsize=1)
def _slots(requests: int, length: int) -> tuple[Tensor, Tensor]:
    """Return 0 to `requests`, and the slots ``[requests, length]`` of requests end to end."""
    slots = torch.arange(requests * length, dtype=torch.int32).view(requests, length)
    return torch.arange(requests + 1), slots


def _attend_to_slots(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float
) -> Tensor:
    """One query a row on the CPU: each head of K/V is read up to its row's own length, no further.

    To the operator of paged attention every head of every row is a request of its own.
    """
    rows, heads, _, head_dim = query.shape
    _, kv_heads, length, _ = key.shape
    requests = rows * kv_heads
    order, slots = _slots(requests, length)
    context = PagedContext(
        key.view(-1, 1, head_dim),
        value.view(-1, 1, head_dim),
        slots,
        order[:-1],
        attention_mask[:, 0, 0].sum(-1).repeat_interleave(kv_heads),
    )
    attended = paged_attention(
        query.reshape(requests, heads // kv_heads, head_dim),
        context,
        order,
        window=-1,
        causal=True,
        scale=scaling,
        logit_cap=0.0,
    )
    return attended.view(rows, 1, heads, head_dim)


AttentionInterface.register(ATTENTION, grouped_attention)


class _Layer:
    """K and V of one layer, allocated when the first tokens show their shape."""

    keys: Tensor | None = None
    values: Tensor | None = None


class SlotCache(Cache):
    """Rows of K/V, each with its own length; the caller says where tokens go before each forward.

    Args:
        rows: Sequences side by side.
        max_length: Positions a row.
        num_layers: Attention layers of the model.
    """

    def __init__(self, rows: int, max_length: int, num_layers: int) -> None:
        super().__init__(layers=[_Layer() for _ in range(num_layers)])  # type: ignore[misc]
        self.rows, self.max_length = rows, max_length
        self._rows: Tensor | None = None
        self._positions: Tensor | None = None
        self._limit = max_length

    def fill(self, rows: Tensor) -> None:
        """Write the next forward's tokens from position 0 on, into these rows; they see each other.

        Args:
            rows: ``[n]`` int64; the forward has n sequences, padded at the end, and no mask.
        """
        self._rows, self._positions = rows, None

    def extend(self, positions: Tensor, limit: int) -> Tensor:
        """Write the next forward's tokens at these positions of all rows.

        Args:
            positions: ``[rows, Q]`` int64; what is kept there is overwritten.
            limit: Positions below which every row's tokens lie; attention reads no further.

        Returns:
            ``[rows, 1, Q, limit]`` bool, the causal mask to pass to the model.
        """
        self._rows, self._positions, self._limit = None, positions, limit
        return torch.arange(limit, device=positions.device) <= positions[:, None, :, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store ``[n, KV, Q, hd]`` and return what the tokens attend over."""
        layer: Any = self.layers[layer_idx]
        if layer.keys is None:
            _, heads, _, head_dim = key_states.shape
            shape = (self.rows, heads, self.max_length, head_dim)
            layer.keys, layer.values = key_states.new_zeros(shape), key_states.new_zeros(shape)
        if self._rows is not None:
            length = key_states.shape[2]
            layer.keys[self._rows, :, :length] = key_states
            layer.values[self._rows, :, :length] = value_states
            return key_states, value_states
        assert self._positions is not None
        row = torch.arange(self.rows, device=key_states.device)[:, None]
        layer.keys[row, :, self._positions] = key_states.transpose(1, 2)
        layer.values[row, :, self._positions] = value_states.transpose(1, 2)
        return layer.keys[:, :, : self._limit], layer.values[:, :, : self._limit]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always passed explicitly, so nothing is counted here."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Used by transformers when it builds a mask itself: for the tokens of a fill."""
        return query_length, 0
