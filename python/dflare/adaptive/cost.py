"""How long a decode step takes, by batch size and verify width.

Seeded with step times measured when the engine starts, refined by every step it serves:

    log seconds(batch, width) = log seed(batch, width) + drift + shift[width] + cell[batch, width]

``drift`` is what all steps share now: a slower machine, longer contexts, other work. It may change
from one step to the next, so that what a width costs against another shows only in steps that lie
close together in time. ``shift`` and ``cell`` are what start-up measured wrong, for a width as a
whole and for one cell; they change slowly. All are estimated by one Kalman filter with the full
covariance: it knows that a width which is never left says nothing about the others, however long
it is served. Residuals beyond a few times what noise and doubt explain are clipped: where the times
are known, one stalled step teaches next to nothing and a lasting change is followed within some
tens of steps; where start-up may have measured anything, the first steps are believed.
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

_DRIFT_NOISE = 0.03**2  # variance that one step adds to the drift
_SHIFT_VAR = 0.1**2  # of start-up measurements of a width, and what forgetting leads back to
_CELL_VAR = 0.1**2  # the same of one cell
_GUESS_VAR = 0.3**2  # the same of a cell beyond the measured batch sizes
_MEMORY = 5000  # steps in which a correction fades to a third of what was learned
_CLIP = 2.5  # in standard deviations of a residual
_SCALE_GAIN = 0.05
_FIRST_SCALE = 0.05
_HOPE = 3**0.5  # standard deviations by which a width may be cheaper than it looks


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
        own_var = [_CELL_VAR] * len(batches)
        while batches[-1] < largest:
            batches.append(min(2 * batches[-1], largest))
            seed = np.vstack((seed, _next_row(batches, seed)))
            own_var.append(_GUESS_VAR)
        self._batches = np.array(batches)
        self._log_seed = np.log(seed)
        count = len(self.widths)
        # State: the drift, then row by row the corrections, shift and cell in one.
        same_width = np.tile(np.eye(count), (len(batches), len(batches)))
        self._prior = _SHIFT_VAR * same_width + np.diag(np.repeat(own_var, count))
        self._mean = np.zeros(1 + seed.size)
        self._var = np.zeros((1 + seed.size, 1 + seed.size))
        self._var[0, 0] = _SHIFT_VAR
        self._var[1:, 1:] = self._prior
        self._scale = _FIRST_SCALE
        self._age = 0  # steps since the corrections aged
        self._refresh()

    def seconds(self, batch: int) -> Array:
        """Predicted seconds of a step of `batch` requests for each width, [widths]."""
        low, high, share = self._between(batch)
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

    def doubt(self, batch: int, against: int) -> Array:
        """Factor, at most 1, by which each width may be cheaper than predicted, [widths].

        Args:
            batch: Requests of the step.
            against: Index of the width that the others are compared with; its own factor is 1.
        """
        count = len(self.widths)
        first = 1 + int(np.abs(self._batches - batch).argmin()) * count
        var = self._var[first : first + count, first : first + count]
        own = var.diagonal()
        var = own + own[against] - 2 * var[against]
        return np.exp(-_HOPE * np.sqrt(np.maximum(var, 0.0)))

    def observe(self, batch: int, width: int, seconds: Sequence[float]) -> None:
        """Learn from served steps of one kind in a row.

        Args:
            batch: Requests of each step.
            width: Tokens verified per request.
            seconds: What each step took, from its predecessor's result to its own; at least one.
        """
        column, steps = self._column[width], len(seconds)
        low, high, share = self._between(batch)
        share = min(share, 1.0)
        cells = [1 + row * len(self.widths) + column for row in (low, high)]
        weights = np.array([1 - share, share])
        self._forget(steps)
        predicted = (1 - share) * self._raw[low, column] + share * self._raw[high, column]
        residuals = np.log(np.asarray(seconds) / predicted)
        along = self._var[0] + weights @ self._var[cells]
        doubt = float(along[0] + weights @ along[cells])
        gain = along / (doubt + self._scale**2 / steps)
        # The drift's noise is in the scale already: it is what usual residuals are made of.
        unknown = max(doubt - steps * _DRIFT_NOISE, 0.0)
        limit = _CLIP * math.sqrt(self._scale**2 + unknown)
        self._mean += gain * _clip(residuals, limit).mean()
        # What was clipped may have been a stall: it leaves the doubt, and the next step decides.
        self._var -= (np.abs(residuals) < limit).mean() * gain[:, None] * along
        usual = 1.25 * float(np.abs(_clip(residuals, _CLIP * self._scale)).mean())
        self._scale += _SCALE_GAIN * (usual - self._scale)
        self._refresh()

    def _forget(self, steps: int) -> None:
        """Let the estimates age; the corrections, which age slowly, many steps at a time."""
        self._var[0, 0] += steps * _DRIFT_NOISE
        self._age += steps
        if self._age < _MEMORY // 50:
            return
        kept, self._age = math.exp(-self._age / _MEMORY), 0
        self._mean[1:] *= kept
        self._var[0, 1:] *= kept
        self._var[1:, 0] *= kept
        self._var[1:, 1:] *= kept**2
        self._var[1:, 1:] += (1 - kept**2) * self._prior

    def _between(self, batch: int) -> tuple[int, int, float]:
        """The two measured batch sizes around `batch`, and its way from the lower to the higher."""
        rows = self._batches
        if len(rows) == 1:
            return 0, 0, 0.0
        high = min(max(int(np.searchsorted(rows, batch)), 1), len(rows) - 1)
        share = (batch - rows[high - 1]) / (rows[high] - rows[high - 1])
        return high - 1, high, max(float(share), 0.0)

    def _refresh(self) -> None:
        correction = self._mean[1:].reshape(self._log_seed.shape)
        grid = self._raw = np.exp(self._log_seed + correction + self._mean[0])
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


def _clip(residuals: Array, limit: float) -> Array:
    return np.minimum(np.maximum(residuals, -limit), limit)


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
