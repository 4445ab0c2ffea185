"""Where a decode step's time goes: `DFLARE_STEP_TRACE=FOLDER` writes tables and a Chrome trace.

Each part is fenced by a device synchronisation while tracing, so that its time is its own; a traced
server is therefore slower than an untraced one where work would overlap.
"""

import json
import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from sglang.srt.runtime_context import get_serving, get_spec

from dflare.adaptive import StepTime, save_step_times
from dflare.errors import DFlareError
from dflare.processor import device_name

logger = logging.getLogger(__name__)

TRACE_ENV = "DFLARE_STEP_TRACE"
PARTS = ("draft", "verify", "sampling", "append", "schedule")
_COLUMNS = ("batch", "width", "steps", *PARTS, "other", "step", "step / verify")
_KEPT_STEPS = 256  # the latest of each (batch, width); the table is made of them
_TABLE_SECONDS = 1.0  # between two writings of the table


class StepTimer:
    """Collects how long each part of each decode step took.

    Two files follow the steps, because a server may end by a kill: `steps-<pid>.md`, the table,
    about once a second, and `trace-<pid>.json`, the Chrome trace, at every step. The time that
    writing takes belongs to no step.
    """

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        """
        Args:
            folder: Where the files go; made if it does not exist.
            device: Waited for at both ends of every part.

        Raises:
            DFlareError: the files cannot be made there.
        """
        self._device = torch.device(device)
        self._cells: dict[tuple[int, int], deque[dict[str, float]]] = defaultdict(
            lambda: deque(maxlen=_KEPT_STEPS)
        )
        self._parts: dict[str, float] | None = None  # of the decode step that runs now
        self._inside = False  # whether one of them runs now
        self._step_end: float | None = None  # of the step just before, if that was a decode step
        self._table_written = float("-inf")
        self._table_path = folder / f"steps-{os.getpid()}.md"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._trace = _TraceFile(folder / f"trace-{os.getpid()}.json")
        except OSError as error:
            raise _unwritable(folder, error) from error

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, timed as `part` of the decode step in which it runs.

        Prefills and dummy steps at start-up call the same functions; they are not timed. A part
        that runs inside another one counts with that one.
        """

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._parts is None or self._inside:
                return function(*args, **kwargs)
            self._inside = True
            start = self._now()
            try:
                result = function(*args, **kwargs)
            finally:
                self._inside = False
            end = self._now()
            self._parts[part] += end - start
            self._trace.add(part, start, end)
            return result

        return timed

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the worker's `forward_batch_generation`, which times every decode step."""

        def timed(batch: Any, *args: Any, **kwargs: Any) -> Any:
            previous_end, self._step_end = self._step_end, None
            mode = batch.forward_mode
            if mode.is_extend() or batch.is_extend_in_batch or mode.is_idle():
                return function(batch, *args, **kwargs)
            requests = len(batch.reqs)
            start = self._now()
            parts = self._parts = dict.fromkeys(PARTS, 0.0)
            try:
                result = function(batch, *args, **kwargs)
                end = self._now()
            finally:
                self._parts = None
            if not self._trace.open:
                return result
            cell = requests, int(result.speculative_num_draft_tokens)
            self._close_step(cell, parts, previous_end, start, end)
            self._step_end = time.perf_counter()
            return result

        return timed

    def _close_step(
        self,
        cell: tuple[int, int],
        parts: dict[str, float],
        previous_end: float | None,
        start: float,
        end: float,
    ) -> None:
        self._trace.add("step", start, end, batch=cell[0], width=cell[1])
        if previous_end is not None:
            self._trace.add("schedule", previous_end, start)
            # Behind a prefill nobody knows what scheduling this step took: it is in the trace only.
            parts["other"] = end - start - sum(parts.values())
            parts["schedule"] = start - previous_end
            parts["step"] = end - previous_end
            self._cells[cell].append(parts)
        try:
            self._trace.flush()
            if self._cells and end - self._table_written > _TABLE_SECONDS:
                self._table_written = end
                _replace(self._table_path, self.table())
        except OSError as error:
            # The folder has vanished or the disk is full: requests matter more than their times.
            self._trace.open = False
            logger.error("DFLARE: no more step times in %s: %s", self._table_path.parent, error)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def table(self) -> str:
        """The latest 256 steps of each batch size and width as a Markdown table, milliseconds.

        All columns are medians but `append`, a mean: on a CPU one step of width 1 in 15 appends
        for all of them.
        """
        lines = [_row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
        for (batch, width), steps in sorted(self._cells.items()):
            times = {name: 1e3 * median(step[name] for step in steps) for name in steps[0]}
            times["append"] = 1e3 * mean(step["append"] for step in steps)
            cells = [f"{times[name]:.2f}" for name in (*PARTS, "other", "step")]
            ratio = f"{times['step'] / times['verify']:.2f}"
            lines.append(_row([str(batch), str(width), str(len(steps)), *cells, ratio]))
        return "\n".join(lines) + "\n"


class _TraceFile:
    """A file in Chrome's trace event format, complete after every `flush`."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self.open = True  # until a write fails
        self._pid = os.getpid()
        name = {"name": "process_name", "ph": "M", "pid": self._pid}
        self._new = ["[" + json.dumps(name | {"args": {"name": "DFLARE decode steps"}})]
        self._end = 0
        self.flush()

    def add(self, name: str, start: float, end: float, **args: int) -> None:
        """Add an event that lasted from `start` to `end`, both in seconds."""
        if not self.open:
            return
        times = {"ts": round(start * 1e6, 1), "dur": round((end - start) * 1e6, 1)}
        event = {"name": name, "ph": "X", "pid": self._pid, "tid": 0} | times
        self._new.append(json.dumps(event | {"args": args}))

    def flush(self) -> None:
        """Write the new events over the bracket that ends the file, and the bracket again."""
        self._file.seek(self._end)
        self._file.write((",\n" if self._end else "") + ",\n".join(self._new))
        self._new.clear()
        self._end = self._file.tell()
        self._file.write("\n]\n")
        self._file.flush()


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _replace(path: Path, text: str) -> None:
    """Write a file that a reader, or a kill, never finds half written."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def save_start_up_times(measured: Iterable[StepTime]) -> None:
    """Keep the step times measured at start-up if `DFLARE_STEP_TRACE` names a folder.

    They go to `step-times-<pid>.json`, which `dflare.adaptive.CostTable.load` reads.

    Raises:
        DFlareError: the folder cannot be written to.
    """
    if not os.environ.get(TRACE_ENV):
        return
    folder = Path(os.environ[TRACE_ENV])
    models = get_serving().served_model_name, get_spec().speculative_draft_model_path
    target, draft = (Path(model).name for model in models)
    versions = f"sglang {version('sglang')}, torch {version('torch')}"
    about = f"{target} with {draft}; {device_name()}; {versions}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_step_times(folder / f"step-times-{os.getpid()}.json", measured, about)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> DFlareError:
    return DFlareError(
        f"{TRACE_ENV}={folder}: {error.strerror}; expected a folder that can be written to"
    )


def trace_steps(worker: Any) -> None:
    """Time the parts of a `DFlareWorker`'s decode steps if `DFLARE_STEP_TRACE` names a folder.

    Raises:
        DFlareError: the folder cannot be written to.
    """
    folder = os.environ.get(TRACE_ENV)
    if not folder:
        return
    timer = StepTimer(Path(folder), worker.device)
    parts = [
        (worker.draft_model_runner, "forward", "draft"),
        # The head and its argmax, where no CUDA graph of the drafter holds them.
        (worker, "_greedy_sample_from_vocab_parallel_head", "draft"),
        (worker.target_worker, "forward_batch_generation", "verify"),
        (worker, "_accept_block", "sampling"),
        (worker.context, "append", "append"),
    ]
    if worker._target_logits_processor is not None:
        # Tensor-parallel logits that the target left in shards.
        parts += [
            (worker._target_logits_processor, "deferred_argmax", "sampling"),
            (worker._target_logits_processor, "finish_deferred_gather", "sampling"),
        ]
    for owner, name, part in parts:
        setattr(owner, name, timer.wrap(part, getattr(owner, name)))
    worker.forward_batch_generation = timer.step(worker.forward_batch_generation)
