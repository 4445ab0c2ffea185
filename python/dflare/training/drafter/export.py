"""Write a trained drafter for serving."""

import math
from pathlib import Path

import torch
from torch import Tensor

from dflare.checkpoint import (
    DRAFT_TO_TARGET,
    draft_vocabulary,
    expected_tensors,
    load_dflash_tensors,
    load_tensors,
    read_config,
    read_dflash_config,
    save_checkpoint,
)
from dflare.checkpoint.save import write_checkpoint
from dflare.training.drafter.model import Drafter
from dflare.training.errors import TrainingError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_drafter(drafter: Drafter, state: dict[str, Tensor], folder: Path) -> Path:
    """Write a drafter so that the engine loads it without edits.

    DFlare goes out in the AngelSlim dialect (shared K/V as equal projections for context and
    block, which computes the same); DFlash in the form that SGLang's own DFLASH algorithm loads.

    Args:
        drafter: Gives configuration and architecture.
        state: Its weights, whole and unsharded.
        folder: Destination; a checkpoint that is there is replaced.

    Returns:
        The destination.

    Raises:
        TrainingError: Weights that are not finite.
        CheckpointError: The folder cannot be written.
    """
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise TrainingError(f"{folder}: not written, NaN or infinity in {', '.join(bad)}")
    config = drafter.config
    tensors = {name: tensor.to(_DTYPES[config.dtype]) for name, tensor in state.items()}
    if drafter.architecture == "dflash":
        # The same configuration under DFlash's name; ``fc`` in place of the fusion logits.
        content = config.to_dict() | {"architectures": ["DFlashDraftModel"]}
        return write_checkpoint(folder, content, tensors, force=True)
    for name in list(tensors):
        for projection in ("k_proj", "v_proj"):
            twin = name.replace(f".{projection}.", f".{projection}_target.")
            if twin not in tensors:
                tensors[twin] = tensors[name].clone()
    if drafter.draft_ids is not None:
        rows = torch.arange(len(drafter.draft_ids), device=drafter.draft_ids.device)
        tensors[DRAFT_TO_TARGET] = drafter.draft_ids - rows
    return save_checkpoint(folder, config, tensors, force=True)


def export_size(drafter: Drafter) -> int:
    """Return the bytes of a drafter's exported weights, rounded up; weights need not exist."""
    config = drafter.config
    if drafter.architecture == "dflash":
        shapes = {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}
    else:
        shapes = expected_tensors(config)
    values = sum(math.prod(shape) for shape in shapes.values())
    entry = 128  # of a tensor in the file's header: name, dtype, shape and place as JSON
    header = 128 + sum(len(name) + entry for name in shapes)
    return values * _DTYPES[config.dtype].itemsize + header


def load_drafter(path: str | Path) -> Drafter:
    """Load a drafter in float32 on the CPU: DFlare of any dialect, or DFlash.

    Args:
        path: Folder or hub id.

    Raises:
        CheckpointError: Neither a DFlare nor a DFlash drafter, or not a whole one.
    """
    config = read_dflash_config(path)
    if config is not None:
        drafter = Drafter(config, "dflash")
        tensors = load_dflash_tensors(path, config)
    else:
        config = read_config(path)
        drafter = Drafter(config)
        tensors = load_tensors(path, config)
        if config.draft_vocab_size is not None:
            drafter.draft_ids = draft_vocabulary(tensors.pop(DRAFT_TO_TARGET), config.vocab_size)
    drafter.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return drafter.eval()
