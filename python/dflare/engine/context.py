"""The drafter's context: from the target's tapped states to K/V in the drafter's pool."""

from collections.abc import Sequence
from typing import Any

import torch

from dflare import ops

# Plain steps whose rows may wait. The policy times every 8th; appends must not always fall on one.
_MOST_STEPS = 15
_MOST_BYTES = 64 << 20  # of states that wait; beyond it appends are rarer than they are dear


class ContextAppender:
    """Writes context K/V of all drafter layers at once; rows of plain steps may wait for others.

    A step of width 1 spends more on streaming the context projection's weights for a few rows than
    on the rows, and nothing reads them before the next draft. All rows that wait are of one
    unchanged set of requests: the slots of a request that has ended may belong to another one soon,
    and the radix cache may hand them on. So whoever runs a batch calls `flush` first.
    """

    def __init__(
        self,
        model: Any,
        k_pools: Sequence[torch.Tensor],
        v_pools: Sequence[torch.Tensor],
        *,
        at_once: bool,
    ) -> None:
        """
        Args:
            model: the drafter, a `QwenDFlareDraftModel`.
            k_pools, v_pools: of each of its layers, [slots, KV, hd].
            at_once: whether no row may wait: something but the worker's batches reads or writes
                the pools.
        """
        self._model, self._pools = model, ops.Pools(list(k_pools), list(v_pools))
        self._at_once = at_once
        self._requests: Sequence[str] = ()  # of the batch that runs now
        self._steps = self._count = 0  # that wait, and their rows
        self._states = self._slots = self._positions = torch.empty(0)

    def append(
        self,
        states: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        *,
        block_size: int = 1,
        commit_lens: torch.Tensor | None = None,
    ) -> None:
        """Write the context K/V of target tokens into their slots.

        Args:
            states: [N, T * H] tapped states, one row a token; rows beyond `len(slots)` are padding.
            slots, positions: [N] int64.
            block_size: B, the tokens of a request, N = bs * B.
            commit_lens: [bs]; of each block only so many first rows are written. All by default.
        """
        if not len(slots):
            return
        model = self._model
        with torch.inference_mode():
            eps = model.hidden_norm.variance_epsilon
            weights = ops.ContextWeights(
                model.fusion_probs,
                model.hidden_norm.weight,
                eps,
                model.context_kv_proj,
                model.context_kv_bias,
                model.k_norm_weights,
                eps,
            )
            ops.append_context_kv(
                states[: len(slots)].to(model.context_kv_proj.dtype),
                weights,
                model.layers[0].self_attn.rotary_emb.cos_sin_cache,
                positions.long(),
                slots.long(),
                None if commit_lens is None else commit_lens.int(),
                block_size,
                self._pools,
            )

    def flush(self, requests: Sequence[str] = ()) -> None:
        """Append what waits, before a batch runs.

        Rows stay if the batch is a plain step of just the requests that they belong to, unless
        they have become too many.

        Args:
            requests: ids of the requests of a plain step; none before any other batch.
        """
        kept = bool(requests) and self._steps < _MOST_STEPS and self._requests == requests
        self._requests = requests
        if not self._count or (kept and self._count + len(requests) <= len(self._states)):
            return
        rows = slice(0, self._count)
        self._steps = self._count = 0
        self.append(self._states[rows], self._slots[rows], self._positions[rows])

    def defer(self, states: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Keep copies of the rows of a plain step, or append them where none may wait.

        Args:
            states: [bs, T * H], padding behind them; slots, positions: [bs] int64.
        """
        rows = len(slots)
        room = min(_MOST_STEPS * rows, _MOST_BYTES // (states.shape[1] * states.element_size()))
        if self._at_once or room < 2 * rows:
            self.append(states, slots, positions)
            return
        if not self._count and len(self._states) != room:
            self._states = torch.empty_like(states[:0]).resize_(room, states.shape[1])
            self._slots, self._positions = slots.new_empty(room), positions.new_empty(room)
        into = slice(self._count, self._count + rows)
        self._states[into] = states[:rows]
        self._slots[into] = slots
        self._positions[into] = positions
        self._count, self._steps = self._count + rows, self._steps + 1
