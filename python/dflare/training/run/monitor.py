"""What a run tells while it runs: a progress bar, JSONL, and TensorBoard, wandb or trackio."""

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dflare.training.errors import ConfigError
from dflare.training.run.config import TrainConfig


class Tracker(Protocol):
    """What a run of wandb is, and one of trackio."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take in numbers of a step."""

    def finish(self) -> None:
        """Write what is left."""


class TensorBoard:
    """TensorBoard, spoken to as the others are.

    Args:
        folder: Of its files.
        resumed_at: Step at which the run goes on; what was logged after it is taken out.

    Raises:
        ImportError: It is not installed.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Purges from this step on; the line of the step that was saved last stays.
        purge = resumed_at + 1 if resumed_at else 0
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, values: dict[str, float], step: int) -> None:
        """Take in numbers of a step."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        """Write what is left."""
        self._writer.close()


def start_tracker(config: TrainConfig, resumed_at: int) -> Tracker | None:
    """Start what ``run.tracker`` names; none where it is TensorBoard and not installed.

    Raises:
        ConfigError: One that was asked for is not installed.
    """
    name, folder = config.run.tracker, Path(config.run.output)
    if name == "tensorboard":
        try:
            return TensorBoard(folder / "tensorboard", resumed_at)
        except ImportError:
            return None  # an optional dependency; the JSONL log holds everything
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"run.tracker is {name}, which is not installed ({error}); run: pip install {name}"
        ) from error
    project = os.environ.get(f"{name.upper()}_PROJECT", "dflare")
    settings = config.model_dump(mode="json")
    return package.init(project=project, name=folder.name, config=settings, resume="allow")


class Monitor:
    """Writes a run's log and shows its progress; silent on every rank but the first.

    Args:
        config: Gives the output folder, for ``log.jsonl``, and the tracker.
        speaks: Whether this rank writes.
        resumed_at: Step at which the run goes on; lines logged after it are taken out.
    """

    def __init__(self, config: TrainConfig, speaks: bool, resumed_at: int = 0) -> None:
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
        self._file = Path(config.run.output) / "log.jsonl"
        self._tracker: Tracker | None = None
        if not speaks:
            return
        if resumed_at:
            self._drop_after(resumed_at)
        else:
            self._file.unlink(missing_ok=True)
        self._tracker = start_tracker(config, resumed_at)

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
        if self._tracker is not None:
            self._tracker.finish()

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a line to the log, and give its numbers to the tracker.

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
        if self._tracker is not None:
            numbers: dict[str, float] = {}
            for key, value in values.items():
                if isinstance(value, list):
                    slots = enumerate(value, 1)
                    numbers |= {f"{kind}/{key}/slot{slot:02d}": share for slot, share in slots}
                else:
                    numbers[f"{kind}/{key}"] = value
            self._tracker.log(numbers, step=step)

    def show(self, share: float, text: str, left: str) -> None:
        """Move the progress bar to a share of the run."""
        self._progress.update(self._task, completed=share, description=text, left=left)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, highlight=False)
