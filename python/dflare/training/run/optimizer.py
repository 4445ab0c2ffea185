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


def make_optimizer(drafter: Drafter, section: OptimizerSection) -> torch.optim.AdamW:
    """Make AdamW; only matrices decay: norms, biases and fusion logits do not.

    Each group's ``rate`` is its share of the learning rate. The fusion logits have one of their
    own: AdamW moves a parameter by about the learning rate a step, and a logit has far to go.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    fusion: list[nn.Parameter] = []
    for name, parameter in drafter.named_parameters():
        if name == "layer_fusion_weights":
            fusion.append(parameter)
        else:
            (decayed if parameter.dim() > 1 else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay, "rate": 1.0},
        {"params": free, "weight_decay": 0.0, "rate": 1.0},
        {"params": fusion, "weight_decay": 0.0, "rate": section.fusion_rate},
    ]
    groups = [group for group in groups if group["params"]]  # DFlash has no fusion logits
    return torch.optim.AdamW(
        groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True
    )
