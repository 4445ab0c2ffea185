"""Accept length and per-slot acceptance, from which drafted tokens were right."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Acceptance:
    """How far blocks would have been accepted.

    Args:
        accept_length: Tokens a verify step: the drafted tokens accepted, and the target's own.
        reached: For slot j = 1 .. B-1, the share of blocks accepted at least that far.
        correct: For slot j, the share of supervised slots that are right, whatever is before them.
    """

    accept_length: float
    reached: list[float]
    correct: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, rounded for reading."""
        return {
            "accept_length": round(self.accept_length, 4),
            "reached": [round(share, 4) for share in self.reached],
            "correct": [round(share, 4) for share in self.correct],
        }


class AcceptanceMeter:
    """Adds up blocks on their device, so that nothing waits until the result is asked for.

    Args:
        slots: B-1.
        device: Where the blocks are.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        # Rows: blocks accepted up to the slot, right slots, supervised slots; then loss and blocks.
        self.sums = torch.zeros(3 * slots + 2, dtype=torch.float64, device=device)
        self._slots = slots

    def add(self, correct: Tensor, supervised: Tensor, loss: Tensor) -> None:
        """Count blocks; both masks are ``[N, B-1]``, and ``correct`` holds in supervised slots."""
        self.sums += torch.cat(
            [
                correct.cumprod(-1).sum(0),
                correct.sum(0),
                supervised.sum(0),
                loss.detach()[None],
                supervised[:, 0].sum()[None],
            ]
        )

    def result(self) -> tuple[Acceptance, float]:
        """Return acceptance so far, and the sum of the losses."""
        n = self._slots
        sums = self.sums.tolist()
        blocks = max(sums[-1], 1.0)
        reached = [count / blocks for count in sums[:n]]
        correct = [
            right / max(of, 1.0)
            for right, of in zip(sums[n : 2 * n], sums[2 * n : 3 * n], strict=True)
        ]
        return Acceptance(1.0 + sum(reached), reached, correct), sums[-2]
