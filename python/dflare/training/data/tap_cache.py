"""The target's states on disk, so that a run over several epochs reads each sequence once.

One array of bfloat16, a row a token, and one flag a sequence. Sequences are added as training meets
them; a run that is resumed, or another run over the same data, finds them there.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dflare.training.data.corpus import Corpus
from dflare.training.errors import ConfigError, TrainingError


class TapCache:
    """States of every token of a corpus.

    Args:
        folder: Where they are kept.
        corpus: Training data.
        width: Values a token.
        identity: What else the states depend on: target, taps.

    Raises:
        ConfigError: The folder holds the states of other data or another target.
        TrainingError: The disk has no room.
    """

    def __init__(self, folder: Path, corpus: Corpus, width: int, identity: dict) -> None:
        self._corpus, self._width = corpus, width
        description = {**identity, "width": width, "corpus": corpus.fingerprint()}
        file = folder / "taps.json"
        tokens = int(corpus.offsets[-1])
        if file.exists():
            if json.loads(file.read_text()) != description:
                raise ConfigError(
                    f"data.tap_cache {folder} holds the states of other data or another target; "
                    "delete it or name another folder"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            # An older cache's flags say nothing of this one.
            (folder / "known.bin").write_bytes(b"")
        _reserve(folder / "states.bin", 2 * tokens * width)
        _reserve(folder / "known.bin", len(corpus))
        if not file.exists():
            # Other ranks look for this file: it must be whole when they find it.
            partial = folder / f"taps.json.{os.getpid()}"
            partial.write_text(json.dumps(description))
            partial.replace(file)
        self._states = np.memmap(folder / "states.bin", np.int16, "r+", shape=(tokens, width))
        self._known = np.memmap(folder / "known.bin", np.uint8, "r+", shape=(len(corpus),))

    def unknown(self, sequences: np.ndarray) -> np.ndarray:
        """Return which of these sequences have no states yet."""
        return sequences[self._known[sequences] == 0]

    def put(self, sequences: np.ndarray, states: Tensor) -> None:
        """Keep states ``[n, S, width]`` of sequences that begin at index 0 of each row."""
        bits = states.to(torch.bfloat16).view(torch.int16).cpu().numpy()
        for row, sequence in zip(bits, sequences, strict=True):
            start, end = self._corpus.offsets[sequence : sequence + 2]
            self._states[start:end] = row[: end - start]
            self._known[sequence] = 1

    def get(self, sequences: np.ndarray, length: int) -> Tensor:
        """Return states ``[n, length, width]`` in bfloat16, zero behind the end of a sequence."""
        states = torch.zeros(len(sequences), length, self._width, dtype=torch.bfloat16)
        for row, sequence in enumerate(sequences):
            start, end = self._corpus.offsets[sequence : sequence + 2]
            part = torch.from_numpy(np.asarray(self._states[start:end]))
            states[row, : end - start] = part.view(torch.bfloat16)
        return states


def _reserve(file: Path, size: int) -> None:
    """Give a file its whole size on the disk, keeping what is in it.

    Into a file with holes the states would be written through a mapping, and a mapping that finds
    the disk full ends the process by a bus error, with no message and no snapshot.

    Raises:
        TrainingError: The disk has no room; a file that was not there before is not left behind.
    """
    there = file.exists()
    missing = max(0, size - (512 * file.stat().st_blocks if there else 0))
    free = shutil.disk_usage(file.parent).free
    try:
        if missing > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not there:
            file.unlink(missing_ok=True)
        raise TrainingError(
            f"data.tap_cache needs {missing / 2**30:.1f} GiB in {file.parent}, which has "
            f"{free / 2**30:.1f} GiB left ({error.strerror}); make room, name another folder, or "
            "leave it out to run the target in every step"
        ) from error
