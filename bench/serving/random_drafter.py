"""Drafters with random weights: they cost what trained ones of their shape do."""

from pathlib import Path
from types import SimpleNamespace

import torch

from dflare.checkpoint import DraftConfig, expected_tensors, read_target_config, save_checkpoint
from dflare.training.drafter.init import draft_config
from dflare.training.drafter.section import DrafterSection

# The published drafters' (configs/qwen3-8b.yaml).
_LAYERS, _TAPS, _BLOCK_SIZE = 7, 9, 16


def config_for(target: str | Path) -> DraftConfig:
    """Describe a drafter of the published shape: 7 layers, 9 taps, blocks of 16 tokens.

    Args:
        target: Folder or hub id. A target too shallow for 9 taps gets as many as fit.

    Raises:
        DFlareError: The target cannot be read, or no drafter can belong to it.
    """
    config = read_target_config(target).get_text_config()
    section = DrafterSection(
        layers=_LAYERS,
        taps=max(1, min(_TAPS, config.num_hidden_layers - 3)),
        block_size=_BLOCK_SIZE,
        mask_token_id=config.vocab_size - 1,
    )
    return draft_config(section, SimpleNamespace(config=config))


def write_random_drafter(folder: Path, config: DraftConfig) -> Path:
    """Write a drafter with normally distributed weights, standard deviation 0.02.

    Args:
        folder: Destination; must not hold a checkpoint yet.
        config: The drafter's shape and dtype.
    """
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=draw).mul_(0.02).to(getattr(torch, config.dtype))
        for name, shape in expected_tensors(config).items()
    }
    return save_checkpoint(folder, config, weights)
