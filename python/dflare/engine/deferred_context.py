"""Context rows of plain decode steps, appended many at a time.

On a CPU a step of width 1 spends more on streaming the context projection's weights for a few rows
than on the rows. Nothing reads them before the next draft, so they can wait.
"""

from collections.abc import Callable, Sequence

import torch

# Whose states are kept. The policy times every 8th plain step; appends must not always fall on one.
_MOST_STEPS = 15


class DeferredContext:
    """Rows that wait for their append; all of one unchanged set of requests.

    The slots of a request that has ended may belong to another one soon, and the radix cache may
    hand them on. So whoever runs a batch flushes first, unless it is a plain step of the same
    requests.
    """

    def __init__(self, append: Callable[..., None], *, at_once: bool) -> None:
        """
        Args:
            append: `DFlareWorker._append_target_hidden_to_draft_kv_by_loc`.
            at_once: Whether no row may wait: something but the worker's batches reads or writes
                the drafter's pool.
        """
        self._append = append
        self._at_once = at_once
        self._requests: Sequence[str] = ()  # of the batch that runs now
        self._rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def flush(self, requests: Sequence[str] = ()) -> None:
        """Append what waits, before a batch runs.

        Rows stay if the batch is a plain step of just the requests that they belong to, unless
        they have become too many.

        Args:
            requests: Ids of the requests of a plain step; none before any other batch.
        """
        kept = len(self._rows) < _MOST_STEPS and self._requests == requests
        self._requests = requests
        if not self._rows or kept:
            return
        rows, self._rows = self._rows, []
        hidden, slots, positions = (torch.cat(column) for column in zip(*rows, strict=True))
        self._append(target_hidden=hidden, cache_loc=slots, positions=positions)

    def add(self, hidden: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Keep the rows of the plain step, or append them at once where that costs no more.

        Args:
            hidden: [bs, T * H] tapped states of the step's tokens.
            slots: [bs] where their context K/V belong.
            positions: [bs] absolute positions.
        """
        if self._at_once or not hidden.is_cpu:
            self._append(target_hidden=hidden, cache_loc=slots, positions=positions)
            return
        # The scheduler may write over its tensors before they are read; the states are ours.
        self._rows.append((hidden[: len(slots)], slots.clone(), positions.clone()))
