"""Write a drafter in the AngelSlim dialect, whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflare.checkpoint.config import DraftConfig
from dflare.checkpoint.headers import Advice, TensorHeader, compare
from dflare.checkpoint.problems import raise_problems
from dflare.checkpoint.tensors import expected_headers
from dflare.errors import CheckpointError

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "model.safetensors"


def save_checkpoint(
    folder: str | Path,
    config: DraftConfig,
    tensors: "dict[str, torch.Tensor]",
    *,
    force: bool = False,
) -> Path:
    """Write config.json and model.safetensors.

    The files are written to a folder beside the destination, which then takes its place: what has
    the destination's name is always whole.

    Args:
        folder: Destination.
        config: What to write as config.json, in the AngelSlim dialect.
        tensors: Every tensor of `expected_tensors`, on any device, of the config's dtype.
        force: Replace a checkpoint that is there already.

    Returns:
        The destination.

    Raises:
        CheckpointError: Tensors that do not belong to the config; a destination that is in use; no
            space or no permission.
    """
    destination = Path(folder).expanduser()
    _check(destination, config, tensors)
    return write_checkpoint(destination, config.to_dict(), tensors, force=force)


def write_checkpoint(
    destination: Path,
    content: dict[str, Any],
    tensors: "dict[str, torch.Tensor]",
    *,
    force: bool = False,
) -> Path:
    """Write config.json and model.safetensors as they are given, in any dialect.

    Args:
        destination: Folder; see :func:`save_checkpoint`.
        content: Of config.json.
        tensors: On any device.
        force: Replace a checkpoint that is there already.

    Returns:
        The destination.

    Raises:
        CheckpointError: A destination that is in use; no space or no permission.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_destination(destination, force=force)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    staging = destination.with_name(f".{destination.name}.new-{os.getpid()}")
    weights, config_file = staging / WEIGHTS_FILE, staging / "config.json"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written ({error})") from error
    try:
        save_file(ready, weights, metadata={"format": "pt"})
        config_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # safetensors makes a file that only its owner can read; the user's umask knows better.
        weights.chmod(config_file.stat().st_mode)
        _take_place(staging, destination)
    except (OSError, SafetensorError) as error:
        # A full disk is a SafetensorError while weights are written.
        raise CheckpointError(
            f"{destination}: cannot be written ({error}); free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return destination


def check_destination(folder: str | Path, *, force: bool = False) -> None:
    """Refuse a destination that holds anything, unless it is a checkpoint and `force` is given."""
    destination = Path(folder).expanduser()
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not (destination / "config.json").is_file():
        raise CheckpointError(
            f"{destination}: exists and is not a checkpoint; choose another folder"
        )
    if not force:
        raise CheckpointError(
            f"{destination}: holds a checkpoint already; choose another folder, or replace it with "
            "--force"
        )


def _check(destination: Path, config: DraftConfig, tensors: "dict[str, torch.Tensor]") -> None:
    given = {
        name: TensorHeader(
            name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), destination
        )
        for name, tensor in tensors.items()
    }
    advice = Advice("pass every tensor", "leave them out", "", "; convert it first")
    raise_problems(destination, compare(given, expected_headers(config), advice))


def _take_place(staging: Path, destination: Path) -> None:
    """Move `staging` to `destination`, with what else lies in the old folder (a model card)."""
    if not destination.exists() or not any(destination.iterdir()):
        staging.replace(destination)
        return
    new = {file.name for file in staging.iterdir()}
    for file in destination.iterdir():
        stale = file.name.endswith((".safetensors", ".safetensors.index.json"))
        if file.name not in new and not stale and file.is_file():
            shutil.copy2(file, staging / file.name)
    retired = destination.with_name(f".{destination.name}.old-{os.getpid()}")
    destination.replace(retired)
    try:
        staging.replace(destination)
    except OSError:
        retired.replace(destination)
        raise
    shutil.rmtree(retired, ignore_errors=True)
