"""Snapshots to resume from: the whole state of a run in one file, replaced in one rename."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from dflare.training.errors import ConfigError, TrainingError
from dflare.training.run.config import TrainConfig
from dflare.training.run.ranks import Ranks

FILE = "snapshot.pt"
# What may change between the parts of a run: these three move its end, and with it the schedule ...
_FREE = {"max_minutes", "epochs", "steps"}
# ... and these do not change what is computed, but for rounding (other code, other kernels).
_FREE |= {"output", "device", "compile", "threads", "checkpoint_activations", "shard"}
_FREE |= {"log_every", "validate_every", "save_minutes", "tracker"}
_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


def write_file(path: Path, content: Any) -> None:
    """Save with ``torch.save`` so that the old file stays until the new one is whole.

    Raises:
        TrainingError: No space, or no permission; says that nothing was lost.
    """
    partial = path.with_suffix(".partial")
    try:
        torch.save(content, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's zip writer
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**30
        kept = "the snapshot before it is intact" if path.exists() else "there is none before it"
        raise TrainingError(
            f"{path}: cannot write the snapshot ({error}; {free:.2f} GiB are free there); {kept}. "
            "Make room and go on with --resume"
        ) from error


def check_disk(folder: Path, drafter: nn.Module) -> None:
    """Refuse to start a run whose snapshots would not fit on the disk.

    Args:
        folder: Output folder; it exists. Where it has a snapshot, the next is written beside it
            before it takes its place; the export, which comes last, needs less.
        drafter: A snapshot holds its weights and two moments of each in float32.

    Raises:
        TrainingError: There is less room than that.
    """
    size = 3 * 4 * sum(parameter.numel() for parameter in drafter.parameters())
    needed = size * (1 if (folder / FILE).exists() else 2)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TrainingError(
            f"run.output {folder}: snapshots and export need {needed / 2**30:.2f} GiB, "
            f"{free / 2**30:.2f} GiB are free there; make room, or name another folder"
        )


def full_weights(drafter: nn.Module) -> dict[str, Tensor]:
    """Return the weights, whole and on the CPU; all ranks must call this."""
    state = get_model_state_dict(drafter, options=_OPTIONS)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def save_snapshot(
    folder: Path, drafter: nn.Module, optimizer: Optimizer, progress: dict[str, Any], ranks: Ranks
) -> None:
    """Write the state of a run.

    Args:
        folder: Output folder.
        drafter: The module that trains, unwrapped; sharded weights are gathered.
        optimizer: Its optimizer.
        progress: Steps, minutes, the open window of the log, configuration, data fingerprint.
        ranks: All of them must call this; rank 0 writes.

    Raises:
        TrainingError: The file cannot be written.
    """
    model_state, optimizer_state = get_state_dict(drafter, optimizer, options=_OPTIONS)
    if ranks.leads:
        content = {**progress, "model": model_state, "optimizer": optimizer_state}
        write_file(folder / FILE, content)


def load_snapshot(
    folder: Path, drafter: nn.Module, optimizer: Optimizer, config: TrainConfig, fingerprint: str
) -> dict[str, Any]:
    """Put a run back to where its snapshot left it.

    Args:
        folder: Output folder.
        drafter: Overwritten.
        optimizer: Overwritten.
        config: Of the run that goes on.
        fingerprint: Of its training data.

    Returns:
        The ``progress`` that was saved.

    Raises:
        ConfigError: No snapshot, or one of a run with other settings or data.
    """
    file = folder / FILE
    if not file.exists():
        raise ConfigError(f"{folder}: no {FILE} to resume from; start without --resume")
    content = torch.load(file, map_location="cpu", weights_only=True)
    old, new = _comparable(content["config"]), _comparable(config.model_dump(mode="json"))
    different = [key for key in new if old.get(key) != new[key]]
    if different:
        changes = ", ".join(f"{key} (was {old.get(key)!r}, is {new[key]!r})" for key in different)
        raise ConfigError(
            f"{file}: belongs to a run with other settings: {changes}; put them back, or start "
            "anew with another run.output"
        )
    if content["corpus"] != fingerprint:
        raise ConfigError(
            f"{file}: belongs to a run with other training data; put the data files back, or start "
            "anew with another run.output"
        )
    set_state_dict(
        drafter,
        optimizer,
        model_state_dict=content.pop("model"),
        optim_state_dict=content.pop("optimizer"),
        options=_OPTIONS,
    )
    return content


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten to ``section.key``, without what may change."""
    return {
        f"{section}.{key}": value
        for section, settings in config.items()
        for key, value in settings.items()
        if not (section == "run" and key in _FREE)
        and (section, key) not in (("data", "files"), ("data", "tap_cache"))
    }
