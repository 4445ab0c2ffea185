"""Hidden states on their way from a server to a trainer: one file a sequence, in a shared folder.

A file holds bfloat16 [tokens, (T + 1) * H]: the tapped states side by side, then the normed final
ones. It appears whole or not at all; in its place a `.error` file may say why there is none.
"""

import os
import re
import uuid
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dflare.training.errors import TrainingError

_RID = re.compile(r"dflare-states-[0-9a-f]{32}")
_MOST_BYTES = 4 * 2**30  # that wait for a trainer


def new_name() -> str:
    """Name a request so that a server with ``DFLARE_STATES`` leaves its states."""
    return f"dflare-states-{uuid.uuid4().hex}"


def is_wanted(name: str) -> bool:
    """Whether a request's id asks for its states; no other id may become the name of a file."""
    return _RID.fullmatch(name) is not None


def write_states(folder: Path, name: str, states: Tensor) -> None:
    """Leave states ``[tokens, width]`` for whoever asked; where that cannot be, leave the reason.

    Raises:
        OSError: Not even that.
    """
    waiting = sum(file.stat().st_size for file in folder.glob("*.bf16"))
    if waiting + 2 * states.numel() > _MOST_BYTES:
        write_error(folder, name, f"{waiting} bytes of states wait in {folder} already; empty it")
        return
    partial = folder / f"{name}.partial"
    try:
        bits = states.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy()
        partial.write_bytes(bits.tobytes())
        os.replace(partial, folder / f"{name}.bf16")
    except OSError as error:
        partial.unlink(missing_ok=True)
        write_error(folder, name, f"they cannot be written ({error}); make room in {folder}")


def write_error(folder: Path, name: str, reason: str) -> None:
    """Say why there are no states."""
    (folder / f"{name}.error").write_text(reason)


def read_states(folder: Path, name: str, tokens: int, width: int) -> Tensor:
    """Take the states ``[tokens, width]`` of a request that was answered; the file is removed.

    Raises:
        TrainingError: There are none, or not those of every token.
    """
    file, reason = folder / f"{name}.bf16", folder / f"{name}.error"
    try:
        if reason.exists():
            raise TrainingError(f"the server left no states: {reason.read_text()}")
        content = file.read_bytes()
    except OSError as error:
        raise TrainingError(
            f"the server left no states ({error}); start it with DFLARE_STATES naming the folder "
            "of data.states, and with --disable-cuda-graph"
        ) from error
    finally:
        file.unlink(missing_ok=True)
        reason.unlink(missing_ok=True)
    if len(content) != 2 * tokens * width:
        raise TrainingError(
            f"the server left {len(content)} bytes of states, expected {tokens} tokens of {width} "
            "bfloat16 values; its layers differ from drafter.taps, or its target from target.name"
        )
    bits = np.frombuffer(content, np.int16).reshape(tokens, width)
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)
