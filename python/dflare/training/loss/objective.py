"""Weights of the block loss: D-PACE (arXiv 2605.18810) and exponential decay (DFlash's).

Slots are counted as in the block: slot 0 is the anchor, slots 1 .. B-1 are predicted, so the last
dimension of every tensor here has B-1 entries and entry k belongs to slot j = k + 1.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


def dpace_weights(probability: Tensor, supervised: Tensor, alpha: float) -> Tensor:
    """Weight each slot by what it adds to the expected accept length (D-PACE, section 3).

    With qs_i = (1 - alpha) q_i + alpha and P_j = prod_{i<=j} qs_i, slot j gets
    w_j = sum_{i>=j} m_i P_i: the derivative of the smoothed expected accept length by log q_j.

    Args:
        probability: ``[..., B-1]`` float, the drafter's probability of the target's token.
        supervised: ``[..., B-1]`` bool, m; an unsupervised slot counts as q = 1 and adds nothing.
        alpha: Smoothing in [0, 1]; 0 collapses training, the paper uses 0.5.

    Returns:
        ``[..., B-1]`` float32 without gradient; zero where the slot is not supervised.
    """
    with torch.no_grad():
        smoothed = (1.0 - alpha) * probability.float() + alpha
        reach = torch.where(supervised, smoothed, 1.0).cumprod(-1) * supervised
        return reach.flip(-1).cumsum(-1).flip(-1) * supervised


def decay_weights(supervised: Tensor, gamma: float | Tensor) -> Tensor:
    """Weight slot j by exp(-(j-1) / gamma), the schedule of DFlash.

    Args:
        supervised: ``[..., B-1]`` bool.
        gamma: Slots after which the weight falls to 1/e.

    Returns:
        ``[..., B-1]`` float32; zero where the slot is not supervised.
    """
    slot = torch.arange(supervised.shape[-1], device=supervised.device, dtype=torch.float32)
    return torch.exp(-slot / gamma) * supervised


_NEW_SLOT = 3.0  # weight of a slot that an extended block adds (DBloom, arXiv 2608.30427)


class Objective(BaseModel):
    """Which weights and labels the loss uses; the section of a configuration builds on it.

    Args:
        name: ``dpace`` or ``decay``.
        alpha: D-PACE's smoothing.
        gamma: Decay length in slots (for a growing gamma, its value at the start).
        gamma_end: Decay length at the end of training, reached linearly; none keeps ``gamma``.
        soft_labels: Share of the target's own distribution in the label, 0 (its token) to 1.
        extends: Block size of the trained drafter whose block is extended: slots from there on
            count three times. Without it they would hardly be learned: D-PACE gives little to
            slots that are seldom reached.

    Raises:
        pydantic.ValidationError: A value out of range, or a name that is none of these.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["dpace", "decay"] = "dpace"
    alpha: float = Field(default=0.5, ge=0, le=1)
    gamma: float = Field(default=7.0, gt=0)
    gamma_end: float | None = Field(default=None, gt=0)
    soft_labels: float = Field(default=0.0, ge=0, le=1)
    extends: int | None = Field(default=None, gt=1)

    def gamma_at(self, progress: float) -> float:
        """Decay length at a point of training, ``progress`` running from 0 to 1."""
        if self.gamma_end is None:
            return self.gamma
        return self.gamma + (self.gamma_end - self.gamma) * progress

    def weights(self, probability: Tensor, supervised: Tensor, gamma: float | Tensor) -> Tensor:
        """Slot weights for a decay length of ``gamma``; see the two functions above for shapes."""
        if self.name == "dpace":
            weights = dpace_weights(probability, supervised, self.alpha)
        else:
            weights = decay_weights(supervised, gamma)
        if self.extends is None:
            return weights
        slot = torch.arange(1, weights.shape[-1] + 1, device=weights.device)
        return weights * torch.where(slot >= self.extends, _NEW_SLOT, 1.0)
