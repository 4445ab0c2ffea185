"""Where a decode step's time goes: `DFLARE_STEP_TRACE=FOLDER` writes a table and a Chrome trace.

Each part is fenced by a device synchronisation while tracing, so that its time is its own; a traced
server is therefore slower than an untraced one where work would overlap.
"""

import atexit
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

TRACE_ENV = "DFLARE_STEP_TRACE"
PARTS = ("draft", "verify", "accept", "append", "schedule")


class StepTimer:
    """Collects how long each part of each decode step took.

    Attributes:
        folder: where `steps-<pid>.json` (medians) and `trace-<pid>.json` (Chrome trace) go.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self._device = torch.device(device)
        self._events: list[tuple[str, float, float]] = []
        self._steps: list[dict[str, float]] = []
        self._current: dict[str, float] = defaultdict(float)
        self._step_end: float | None = None
        folder.mkdir(parents=True, exist_ok=True)
        atexit.register(self.write)

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, timed as `part` of the step in which it runs."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._synchronise()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self._synchronise()
            self._record(part, start, time.perf_counter())
            return result

        return timed

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the worker's `forward_batch_generation`, closing a step a decode batch."""

        def timed(batch: Any, *args: Any, **kwargs: Any) -> Any:
            decode = not (batch.forward_mode.is_extend() or batch.is_extend_in_batch)
            width = len(batch.reqs)
            start = time.perf_counter()
            self._current.clear()
            result = function(batch, *args, **kwargs)
            self._synchronise()
            end = time.perf_counter()
            if decode:
                self._close_step(start, end, width)
            self._step_end = end if decode else None
            return result

        return timed

    def _close_step(self, start: float, end: float, batch: int) -> None:
        if self._step_end is not None:
            self._record("schedule", self._step_end, start)
        parts = {part: self._current[part] for part in PARTS}
        parts["other"] = end - start - sum(parts[p] for p in PARTS if p != "schedule")
        parts["step"] = end - start + parts["schedule"]
        parts["batch"] = batch
        self._steps.append(parts)
        # A server may be killed, and long files take long to write.
        if len(self._steps) % (100 if len(self._steps) < 1000 else 1000) == 0:
            self.write()

    def _record(self, part: str, start: float, end: float) -> None:
        self._events.append((part, start, end))
        self._current[part] += end - start

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def table(self) -> dict[str, Any]:
        """Median milliseconds of each part, by batch size, over all steps so far."""
        by_batch: dict[int, list[dict[str, float]]] = defaultdict(list)
        for step in self._steps:
            by_batch[int(step["batch"])].append(step)
        return {
            str(batch): {"steps": len(steps)}
            | {
                name: round(1000 * median(step[name] for step in steps), 3)
                for name in (*PARTS, "other", "step")
            }
            for batch, steps in sorted(by_batch.items())
        }

    def write(self) -> None:
        """Write both files; called every 100 steps, later every 1000, and at exit."""
        table = {"unit": "ms, medians", "by_batch": self.table()}
        (self.folder / f"steps-{os.getpid()}.json").write_text(json.dumps(table, indent=2) + "\n")
        events = [
            {"name": part, "ph": "X", "pid": os.getpid(), "tid": 0}
            | {"ts": start * 1e6, "dur": (end - start) * 1e6}
            for part, start, end in self._events
        ]
        trace = json.dumps({"traceEvents": events})
        (self.folder / f"trace-{os.getpid()}.json").write_text(trace)


def trace_steps(worker: Any) -> None:
    """Time the parts of a `DFlareWorker`'s decode steps if `DFLARE_STEP_TRACE` names a folder."""
    folder = os.environ.get(TRACE_ENV)
    if not folder:
        return
    timer = StepTimer(Path(folder), worker.device)
    runner, target = worker.draft_model_runner, worker.target_worker
    runner.forward = timer.wrap("draft", runner.forward)
    target.forward_batch_generation = timer.wrap("verify", target.forward_batch_generation)
    worker._accept_block = timer.wrap("accept", worker._accept_block)
    worker._append_target_hidden_to_draft_kv_by_loc = timer.wrap(
        "append", worker._append_target_hidden_to_draft_kv_by_loc
    )
    worker.forward_batch_generation = timer.step(worker.forward_batch_generation)
