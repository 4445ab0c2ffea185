"""What a run tells while it runs: a progress bar, JSONL and, where it is installed, TensorBoard."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Monitor:
    """Writes a run's log and shows its progress; silent on every rank but the first.

    Args:
        folder: Output folder: ``log.jsonl`` and ``tensorboard/``.
        speaks: Whether this rank writes.
        resumed_at: Step at which the run goes on; lines logged after it are taken out.
    """

    def __init__(self, folder: Path, speaks: bool, resumed_at: int = 0) -> None:
        self._speaks = speaks
        self.console = Console(stderr=True, quiet=not speaks)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=not speaks,
        )
        self._task = self._progress.add_task("training", total=1.0, left="")
        self._file = folder / "log.jsonl"
        self._board: Any = None
        if not speaks:
            return
        if resumed_at:
            self._drop_after(resumed_at)
        else:
            self._file.unlink(missing_ok=True)
        try:
            from torch.utils.tensorboard import SummaryWriter

            # Purges from this step on; the line of the step that was saved last stays.
            purge = resumed_at + 1 if resumed_at else 0
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        except ImportError:
            pass  # an optional dependency; the JSONL log holds everything

    def _drop_after(self, step: int) -> None:
        """A run that died after its last snapshot repeats steps; the log keeps one of each."""
        if not self._file.exists():
            return
        lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        self._file.write_text("".join(kept), encoding="utf-8")

    def __enter__(self) -> "Monitor":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        if self._board is not None:
            self._board.close()

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a line to the log and its numbers to TensorBoard.

        Args:
            kind: ``train`` or ``validation``.
            step: Steps done.
            values: Numbers and lists of numbers (one for each slot).
        """
        if not self._speaks:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 1), **values}
        with self._file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, list):
                    for slot, share in enumerate(value, 1):
                        self._board.add_scalar(f"{kind}/{key}/slot{slot:02d}", share, step)
                else:
                    self._board.add_scalar(f"{kind}/{key}", value, step)

    def show(self, share: float, text: str, left: str) -> None:
        """Move the progress bar to a share of the run."""
        self._progress.update(self._task, completed=share, description=text, left=left)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, highlight=False)
