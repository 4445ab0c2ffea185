"""AdamW and its schedule."""

import math

import torch
from torch import nn

from dflare.training.drafter.model import Drafter
from dflare.training.run.config import OptimizerSection


def learning_rate(section: OptimizerSection, progress: float) -> float:
    """Linear warm-up, then a half cosine; ``progress`` runs from 0 to 1."""
    if progress < section.warmup:
        return section.learning_rate * progress / section.warmup
    share = min(1.0, (progress - section.warmup) / (1.0 - section.warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * share))
    return section.learning_rate * (section.final_share + (1.0 - section.final_share) * cosine)


def make_optimizer(drafter: Drafter, section: OptimizerSection, fused: bool) -> torch.optim.AdamW:
    """AdamW; only matrices decay: norms, biases and fusion logits do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in drafter.named_parameters():
        matrix = parameter.dim() > 1 and name != "layer_fusion_weights"
        (decayed if matrix else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=fused
    )
