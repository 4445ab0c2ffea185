"""How long a decode step takes, by batch size and verify width.

Seeded with step times measured when the engine starts, refined by every step it serves:

    log seconds(batch, width) = log seed(batch, width) + drift + correction[batch, width]

``drift`` is what all steps share now (a slower machine, longer contexts) and follows fast, so
that widths that are not in use do not look cheap; ``correction`` is a cell's own, follows slowly
and fades while the cell is not served: a width that was dear for a while is tried again. A scalar
Kalman filter splits each residual between the two. Residuals beyond a few times their usual size
are clipped: one stalled step teaches next to nothing, a lasting change is followed within some tens
of steps.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_DRIFT_NOISE = 0.01**2  # variance that one step adds to the drift
_CELL_VAR = 0.1**2  # of a start-up measurement, and what forgetting leads back to
_CELL_MEMORY = 2000  # steps in which a correction fades to a third of what was learned
_KEPT = math.exp(-1 / _CELL_MEMORY)
_GUESS_VAR = 0.3**2  # the same of a cell beyond the measured batch sizes
_CLIP = 2.5  # in units of the usual residual
_SCALE_GAIN = 0.05
_FIRST_SCALE = 0.05
_HOPE = 3**0.5  # standard deviations by which an unvisited cell may be cheaper


class StepTime(NamedTuple):
    """One measured decode step."""

    batch: int
    width: int
    seconds: float


class CostTable:
    """Seconds of a decode step over (batch size, verify width), monotone in both."""

    def __init__(self, widths: Sequence[int], measured: Iterable[StepTime], largest: int = 0):
        """
        Args:
            widths: Widths to answer for, ascending.
            measured: Start-up measurements in any order; repeats count by their median. Cells
                without one are interpolated along the batch sizes of their width, whole widths
                without one between their neighbours.
            largest: Batch size up to which steps will be served. Beyond those that were measured
                each doubling gets cells of its own, which go on with the last slope until steps
                are served.

        Raises:
            ValueError: There is no measurement, or one is not positive.
        """
        cells: dict[tuple[int, int], list[float]] = defaultdict(list)
        for step in measured:
            if step.batch < 1 or step.width < 1 or not step.seconds > 0:
                raise ValueError(f"step times need batch, width and seconds > 0, got {step}")
            cells[step.batch, step.width].append(step.seconds)
        if not cells:
            raise ValueError("a cost table needs at least one measured step, got none")
        self.widths = tuple(widths)
        self._column = {width: i for i, width in enumerate(self.widths)}
        batches = sorted({batch for batch, _ in cells})
        median = {cell: float(np.median(seconds)) for cell, seconds in cells.items()}
        seed = _fill(np.array(batches), self.widths, median)
        self._prior_var = np.full((len(batches), 1), _CELL_VAR)
        while batches[-1] < largest:
            batches.append(min(2 * batches[-1], largest))
            seed = np.vstack((seed, _next_row(batches, seed)))
            self._prior_var = np.vstack((self._prior_var, [[_GUESS_VAR]]))
        self._batches = np.array(batches)
        self._log_seed = np.log(seed)
        self._correction = np.zeros_like(seed)
        self._cell_var = np.tile(self._prior_var, len(self.widths))
        self._drift = 0.0
        self._drift_var = 0.0
        self._scale = _FIRST_SCALE
        self._refresh()

    def seconds(self, batch: int) -> Array:
        """Predicted seconds of a step of `batch` requests for each width, [widths]."""
        rows = self._batches
        if len(rows) == 1:
            return self._grid[0]
        high = min(max(int(np.searchsorted(rows, batch)), 1), len(rows) - 1)
        low = high - 1
        share = max((batch - rows[low]) / (rows[high] - rows[low]), 0.0)
        seconds = self._grid[low] + share * (self._grid[high] - self._grid[low])
        # Beyond the largest measured batch the last slopes go on; they may cross.
        return np.maximum.accumulate(seconds) if share > 1 else seconds

    def describe(self) -> str:
        """The table in one line: milliseconds for every measured batch size, by width."""
        rows = []
        for batch, seconds in zip(self._batches, self._grid, strict=True):
            cells = zip(self.widths, seconds, strict=True)
            rows.append(f"batch {batch}: " + " ".join(f"{w}:{1e3 * s:.2f}" for w, s in cells))
        return "; ".join(rows)

    def doubt(self, batch: int) -> Array:
        """Factor, at most 1, by which each width may be cheaper than predicted, [widths]."""
        return np.exp(-_HOPE * np.sqrt(self._cell_var[self._row(batch)]))

    def observe(self, batch: int, width: int, seconds: float) -> None:
        """Learn from one served step that took `seconds` from start to start of the next."""
        cell = self._row(batch), self._column[width]
        residual = float(np.log(seconds / self.seconds(batch)[cell[1]]))
        limit = _CLIP * self._scale
        residual = min(max(residual, -limit), limit)
        self._drift_var += _DRIFT_NOISE
        self._correction *= _KEPT
        self._cell_var += (1 - _KEPT**2) * (self._prior_var - self._cell_var)
        cell_var = float(self._cell_var[cell])
        total = self._drift_var + cell_var + self._scale**2
        self._drift += self._drift_var / total * residual
        self._drift_var -= self._drift_var**2 / total
        self._correction[cell] += cell_var / total * residual
        self._cell_var[cell] -= cell_var**2 / total
        self._scale += _SCALE_GAIN * (1.25 * abs(residual) - self._scale)
        self._refresh()

    def _row(self, batch: int) -> int:
        return int(np.abs(self._batches - batch).argmin())

    def _refresh(self) -> None:
        grid = np.exp(self._log_seed + self._correction + self._drift)
        # The middle between the tightest monotone bounds from above and from below.
        upper = np.maximum.accumulate(np.maximum.accumulate(grid, axis=0), axis=1)
        flipped = np.minimum.accumulate(grid[::-1, ::-1], axis=0)
        lower = np.minimum.accumulate(flipped, axis=1)[::-1, ::-1]
        self._grid = (upper + lower) / 2

    @classmethod
    def load(cls, path: Path, widths: Sequence[int]) -> Self:
        """Read a table that :func:`save_step_times` wrote."""
        steps = json.loads(path.read_text())["steps"]
        return cls(widths, (StepTime(*step) for step in steps))


def save_step_times(path: Path, measured: Iterable[StepTime], about: str) -> None:
    """Write measurements as JSON, with a sentence `about` what was measured on what."""
    path.write_text(json.dumps({"about": about, "steps": [list(s) for s in measured]}, indent=1))


def _next_row(batches: Sequence[int], seconds: Array) -> Array:
    """Step times of the last of `batches`, from those of the batches before it, [widths]."""
    if len(batches) == 2:
        return seconds[-1]
    step = (batches[-1] - batches[-2]) / (batches[-2] - batches[-3])
    slope = np.maximum(seconds[-1] - seconds[-2], 0.0)
    # Wider steps grow faster; noise in the last two rows must not turn that round.
    return np.maximum.accumulate(seconds[-1] + step * np.maximum.accumulate(slope))


def _fill(
    batches: npt.NDArray[np.int64], widths: Sequence[int], median: dict[tuple[int, int], float]
) -> Array:
    columns: dict[int, Array] = {}
    for width in sorted({width for _, width in median}):
        known = [batch for batch in batches if (batch, width) in median]
        columns[width] = np.interp(batches, known, [median[batch, width] for batch in known])
    measured = np.stack(list(columns.values()), axis=1)
    return np.stack([np.interp(widths, list(columns), row) for row in measured])
