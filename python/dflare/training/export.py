"""Write a trained drafter for serving."""

import json
from pathlib import Path

import torch
from torch import Tensor

from dflare.checkpoint import (
    load_dflash_tensors,
    load_tensors,
    read_config,
    read_dflash_config,
    save_checkpoint,
)
from dflare.training.errors import TrainingError
from dflare.training.model import Drafter

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
        return _export_dflash(drafter, tensors, folder)
    for name in list(tensors):
        for projection in ("k_proj", "v_proj"):
            twin = name.replace(f".{projection}.", f".{projection}_target.")
            if twin not in tensors:
                tensors[twin] = tensors[name].clone()
    return save_checkpoint(folder, config, tensors, force=True)


def _export_dflash(drafter: Drafter, tensors: dict[str, Tensor], folder: Path) -> Path:
    """Same configuration under DFlash's name; ``fc`` in place of the fusion logits."""
    from safetensors.torch import save_file

    content = drafter.config.to_dict() | {"architectures": ["DFlashDraftModel"]}
    folder.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


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
    drafter.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return drafter.eval()
