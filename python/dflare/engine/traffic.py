"""`DFLARE_TRAFFIC=FOLDER`: token ids of what was served, for a drafter that shall learn it.

Kept are the ids of prompt and answer and the number of verify steps, as training data
(`dflare.training.data.files`); no text, no request id, no sampling parameters, no time. Nine of ten
prompts go to ``traffic-*.xz``, to train on, the tenth to ``held-back-*.xz``, to judge by; which one
is told by the prompt alone, so that no prompt is in both.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dflare.engine.named_folder import named_folder
from dflare.training.data.files import DataFile, Record, prompt_key
from dflare.training.errors import DataError

logger = logging.getLogger(__name__)

VARIABLE = "DFLARE_TRAFFIC"
LEARNED, HELD_BACK = "traffic", "held-back"
_HELD_BACK_EVERY = 10
_FILE_CONVERSATIONS = 2048
_MOST_BYTES = 256 * 2**20  # of all files together; the oldest go first
_WAITING = 4096  # conversations between the scheduler and the disk, beyond which they are dropped
_IDLE_SECONDS = 5.0  # after which what was added is written


def traffic_folder() -> Path | None:
    """The folder that the environment names, made if it is not there; None for no record.

    Raises:
        UnsupportedError: it cannot be written to.
    """
    return named_folder(VARIABLE, "to keep token ids of served requests in")


class TrafficLog:
    """Writes finished requests to a folder, in a thread of its own; the scheduler never waits."""

    def __init__(self, folder: Path, target: str, vocab_size: int) -> None:
        """
        Args:
            folder: where to; several servers may share it.
            target: path of the model that answers.
            vocab_size: its.
        """
        self._folder = folder
        self._header = {"target": target, "vocab_size": vocab_size, "served": True}
        self._running: dict[str, Any] = {}
        self._finished: queue.Queue[Record] = queue.Queue(_WAITING)
        self._dropped = self._failed = False
        threading.Thread(target=self._write, name="dflare-traffic", daemon=True).start()

    def note(self, requests: Iterable[Any]) -> None:
        """Know the requests (SGLang's `Req`) of a decode step by their ids."""
        self._running = {request.rid: request for request in requests}

    def finish(self, rid: str) -> None:
        """Keep a request that ended."""
        request = self._running.pop(rid, None)
        if request is None or self._failed:
            return
        prompt, answer = np.array(request.origin_input_ids), np.array(request.output_ids)
        ids = np.concatenate((prompt, answer))
        if ids.max() >= self._header["vocab_size"]:
            return  # an image's place holders are no tokens
        steps = request.spec_verify_ct
        record = Record(ids, [(len(prompt), len(ids))], prompt_key(prompt.tobytes()), steps=steps)
        try:
            self._finished.put_nowait(record)
        except queue.Full:
            if not self._dropped:
                logger.warning(
                    "DFLARE: %s cannot be written fast enough, some is left out", VARIABLE
                )
            self._dropped = True

    def _write(self) -> None:
        files: dict[str, tuple[DataFile, int]] = {}
        try:
            while True:
                try:
                    record = self._finished.get(timeout=_IDLE_SECONDS)
                except queue.Empty:
                    for file, _ in files.values():
                        file.flush()
                    continue
                kind = LEARNED if record.key % _HELD_BACK_EVERY else HELD_BACK
                file, count = files.get(kind) or (self._new_file(kind), 0)
                file.add(record)
                files[kind] = file, count + 1
                if count + 1 == _FILE_CONVERSATIONS:
                    file.close()
                    del files[kind]
        except (DataError, OSError) as error:
            self._failed = True
            logger.error("DFLARE: serving goes on, but no more traffic is kept: %s", error)

    def _new_file(self, kind: str) -> DataFile:
        """Begin a file, and make room for it."""
        files = sorted(self._folder.glob("*.xz"), key=lambda file: file.stat().st_mtime)
        size = sum(file.stat().st_size for file in files)
        for file in files:
            if size <= _MOST_BYTES:
                break
            size -= file.stat().st_size
            file.unlink(missing_ok=True)
        name = f"{kind}-{time.time_ns()}-{os.getpid()}.xz"
        return DataFile(self._folder / name, self._header)
