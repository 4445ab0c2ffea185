"""What is measured between two lines of the log."""

import math
from typing import Any

import torch
from torch import Tensor

from dflare.training.loss.acceptance import AcceptanceMeter
from dflare.training.run.ranks import Ranks


class Window:
    """Sums over the steps since the last line, on their device, so that no step waits for them.

    A snapshot holds them: a run that goes on ends the line that it was stopped in.

    Args:
        slots: B-1.
        device: Where blocks and gradients are.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.meter = AcceptanceMeter(slots, device)
        self.steps = 0
        self.seconds = 0.0
        self._slots = slots
        self._norms = torch.zeros(1, dtype=torch.float64, device=device)

    def end_step(self, norm: Tensor) -> None:
        """Count a step whose gradient, before it was clipped, had this norm (a scalar)."""
        self._norms += norm
        self.steps += 1

    def over(self, ranks: Ranks) -> "Window":
        """Return the sums over all ranks, on the CPU; all ranks must call this."""
        sums = ranks.sum(torch.cat([self.meter.sums, self._norms / ranks.world])).cpu()
        return self._filled(sums, self.steps, self.seconds)

    def _filled(self, sums: Tensor, steps: int, seconds: float) -> "Window":
        device = sums.device
        window = Window(self._slots, device)
        window.meter.sums, window._norms = sums[:-1].clone(), sums[-1:].clone()
        window.steps, window.seconds = steps, seconds
        return window

    @property
    def loss(self) -> float:
        """Mean loss of a step."""
        return self.meter.result()[1] / max(self.steps, 1)

    @property
    def gradient_norm(self) -> float:
        """Mean norm of a step's gradient, before clipping."""
        return float(self._norms) / max(self.steps, 1)

    def problem(self) -> str | None:
        """Say what is not finite, if anything is."""
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        if not math.isfinite(self.gradient_norm):
            return f"the norm of the gradient is {self.gradient_norm}"
        return None

    def state(self) -> dict[str, Any]:
        """Return what a snapshot keeps."""
        sums = torch.cat([self.meter.sums, self._norms])
        return {"sums": sums, "steps": self.steps, "seconds": self.seconds}

    def go_on(self, state: dict[str, Any], ranks: Ranks) -> "Window":
        """Return a window that goes on from a snapshot's; the first rank holds all its blocks."""
        sums = state["sums"].to(self.meter.sums.device)
        if not ranks.leads:
            sums[:-1] = 0.0
        return self._filled(sums, state["steps"], state["seconds"])
