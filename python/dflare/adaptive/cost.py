"""How long a decode step takes, by batch size and arm.

Seeded with step times measured when the engine starts, refined by every step it serves:

    log seconds(batch, arm) = log seed(batch, arm) + drift + shift[arm] + cell[batch, arm]

``drift`` is what all steps share now: a slower machine, longer contexts, other work. It may change
from one step to the next, so that what an arm costs against another shows only in steps that lie
close together in time. ``shift`` and ``cell`` are what start-up measured wrong, for an arm as a
whole and for one cell; they change slowly. All are estimated by one Kalman filter with the full
covariance: it knows that an arm which is never left says nothing about the others, however long
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

from dflare.adaptive.arms import PLAIN, Arm

Array = npt.NDArray[np.float64]

_DRIFT_NOISE = 0.03**2  # variance that one step adds to the drift
_SHIFT_VAR = 0.1**2  # of start-up measurements of an arm, and what forgetting leads back to
_CELL_VAR = 0.1**2  # the same of one cell
_GUESS_VAR = 0.3**2  # the same of a cell beyond the measured batch sizes
_MEMORY = 5000  # steps in which a correction fades to a third of what was learned
_CLIP = 2.5  # in standard deviations of a residual
_SCALE_GAIN = 0.05
_FIRST_SCALE = 0.05
_HOPE = 3**0.5  # standard deviations by which an arm may be cheaper than it looks


class StepTime(NamedTuple):
    """One measured decode step."""

    batch: int
    arm: Arm
    seconds: float


class CostTable:
    """Seconds of a decode step over (batch size, arm), monotone in requests and nodes."""

    def __init__(self, arms: Sequence[Arm], measured: Iterable[StepTime], largest: int = 0):
        """
        Args:
            arms: Arms to answer for: the plain one, then each proposer's by nodes.
            measured: Start-up measurements in any order; repeats count by their median. Cells
                without one are interpolated along the batch sizes of their arm, whole arms
                without one between their proposer's others.
            largest: Batch size up to which steps will be served. Beyond those that were measured
                each doubling gets cells of its own, which go on with the last slope until steps
                are served.

        Raises:
            ValueError: There is no measurement, or one is not positive.
        """
        cells: dict[tuple[int, Arm], list[float]] = defaultdict(list)
        for step in measured:
            if step.batch < 1 or step.arm.nodes < 1 or not step.seconds > 0:
                raise ValueError(f"step times need batch, nodes and seconds > 0, got {step}")
            cells[step.batch, step.arm].append(step.seconds)
        if not cells:
            raise ValueError("a cost table needs at least one measured step, got none")
        self.arms = tuple(arms)
        self._column = {arm: i for i, arm in enumerate(self.arms)}
        self._nodes = np.array([arm.nodes for arm in self.arms], dtype=float)
        # Columns of each proposer, behind the plain arm's: along them time does not fall.
        proposers = list(dict.fromkeys(arm.proposer for arm in self.arms if arm != PLAIN))
        rising = [
            [i for i, arm in enumerate(self.arms) if arm.proposer in (PLAIN.proposer, who)]
            for who in proposers
        ] or [[0]]
        longest = max(map(len, rising))  # the others repeat their last
        self._rising = np.array([own + own[-1:] * (longest - len(own)) for own in rising])
        self._row = [0 if arm == PLAIN else proposers.index(arm.proposer) for arm in self.arms]
        # All proposers on one axis of nodes, one behind the other.
        first = (1 + self._nodes.max()) * np.arange(len(rising))
        self._axis = (first[:, None] + self._nodes[self._rising]).ravel()
        self._first = first[self._row]
        batches = sorted({batch for batch, _ in cells})
        median = {cell: float(np.median(seconds)) for cell, seconds in cells.items()}
        seed = _fill(np.array(batches), self.arms, rising, median)
        own_var = [_CELL_VAR] * len(batches)
        while batches[-1] < largest:
            batches.append(min(2 * batches[-1], largest))
            seed = np.vstack((seed, _next_row(batches, seed, rising)))
            own_var.append(_GUESS_VAR)
        self._batches = np.array(batches)
        self._log_seed = np.log(seed)
        count = len(self.arms)
        # State: the drift, then row by row the corrections, shift and cell in one.
        same_arm = np.tile(np.eye(count), (len(batches), len(batches)))
        self._prior = _SHIFT_VAR * same_arm + np.diag(np.repeat(own_var, count))
        self._mean = np.zeros(1 + seed.size)
        self._var = np.zeros((1 + seed.size, 1 + seed.size))
        self._var[0, 0] = _SHIFT_VAR
        self._var[1:, 1:] = self._prior
        self._scale = _FIRST_SCALE
        self._age = 0  # steps since the corrections aged
        self._refresh()

    def seconds(self, batch: int, nodes: Array | None = None) -> Array:
        """Predicted seconds of a step of `batch` requests for each arm, [arms].

        Args:
            nodes: [arms] tokens of a request that an arm will verify in the mean, where that is
                not what it is called by.
        """
        low, high, share = self._between(batch)
        seconds = self._grid[low] + share * (self._grid[high] - self._grid[low])
        # Beyond the largest measured batch the last slopes go on; they may cross.
        if share > 1:
            seconds[self._rising] = np.maximum.accumulate(seconds[self._rising], axis=1)
        if nodes is None:
            return seconds
        return np.interp(nodes + self._first, self._axis, seconds[self._rising].ravel())

    def of_a_node(self, batch: int, arm: Arm) -> float:
        """Predicted seconds that one more token of one request adds to a step, up to an arm's."""
        column = self._column[arm]
        seconds = self.seconds(batch)
        return float(seconds[column] - seconds[0]) / (batch * (arm.nodes - 1))

    def describe(self) -> str:
        """The table in one line: milliseconds for every measured batch size, by arm."""
        rows = []
        for batch, seconds in zip(self._batches, self._grid, strict=True):
            cells = zip(self.arms, seconds, strict=True)
            rows.append(f"batch {batch}: " + ", ".join(f"{a} {1e3 * s:.2f}" for a, s in cells))
        return "; ".join(rows)

    def doubt(self, batch: int, against: int) -> Array:
        """Factor, at most 1, by which each arm may be cheaper than predicted, [arms].

        Args:
            batch: Requests of the step.
            against: Index of the arm that the others are compared with; its own factor is 1.
        """
        count = len(self.arms)
        first = 1 + int(np.abs(self._batches - batch).argmin()) * count
        var = self._var[first : first + count, first : first + count]
        own = var.diagonal()
        var = own + own[against] - 2 * var[against]
        return np.exp(-_HOPE * np.sqrt(np.maximum(var, 0.0)))

    def observe(
        self, batch: int, arm: Arm, seconds: Sequence[float], nodes: float | None = None
    ) -> None:
        """Learn from served steps of one kind in a row.

        Args:
            batch: Requests of each step.
            arm: What they were.
            seconds: What each step took, from its predecessor's result to its own; at least one.
            nodes: Tokens of a request that they verified in the mean, if not the arm's.
        """
        steps = len(seconds)
        low, high, share = self._between(batch)
        share = min(share, 1.0)
        columns, parts = self._around(arm, nodes)
        cells = [1 + row * len(self.arms) + column for row in (low, high) for column in columns]
        weights = np.outer((1 - share, share), parts).ravel()
        self._forget(steps)
        predicted = float(weights @ self._raw[[low, high]][:, columns].ravel())
        residuals = np.log(np.asarray(seconds) / predicted)
        along = self._var[0] + weights @ self._var[cells]
        doubt = float(along[0] + weights @ along[cells])
        gain = along / (doubt + self._scale**2 / steps)
        # The drift's noise is in the scale already: it is what usual residuals are made of.
        unknown = max(doubt - steps * _DRIFT_NOISE, 0.0)
        limit = _CLIP * math.sqrt(self._scale**2 + unknown)
        self._mean += gain * _clip(residuals, limit).mean()
        # What was clipped may have been a stall: it leaves the doubt, and the next step decides.
        self._var -= ((np.abs(residuals) < limit).mean() * gain)[:, None] * along
        usual = 1.25 * float(np.abs(_clip(residuals, _CLIP * self._scale)).mean())
        self._scale += _SCALE_GAIN * (usual - self._scale)
        self._refresh()

    def _around(self, arm: Arm, nodes: float | None) -> tuple[list[int], tuple[float, ...]]:
        """The columns of a proposer's arms around so many nodes, and the part of each."""
        own = self._column[arm]
        if nodes is None or nodes == arm.nodes:
            return [own], (1.0,)
        rising = self._rising[self._row[own]].tolist()
        sizes = self._nodes[rising]
        nodes = min(nodes, sizes[-1])
        high = max(int(np.searchsorted(sizes, nodes)), 1)
        part = float((nodes - sizes[high - 1]) / (sizes[high] - sizes[high - 1]))
        return [rising[high - 1], rising[high]], (1 - part, part)

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
        upper = np.maximum.accumulate(grid, axis=0)
        upper[:, self._rising] = np.maximum.accumulate(upper[:, self._rising], axis=2)
        lower = np.minimum.accumulate(grid[::-1], axis=0)[::-1]
        from_above = np.minimum.accumulate(lower[:, self._rising[:, ::-1]], axis=2)[..., ::-1]
        lower[:, self._rising] = from_above
        lower[:, 0] = from_above[..., 0].min(axis=1)
        self._grid = (upper + lower) / 2

    @classmethod
    def load(cls, path: Path, arms: Sequence[Arm]) -> Self:
        """Read a table that :func:`save_step_times` wrote."""
        steps = json.loads(path.read_text())["steps"]
        return cls(arms, (StepTime(n, Arm(*arm), seconds) for n, arm, seconds in steps))


def save_step_times(path: Path, measured: Iterable[StepTime], about: str) -> None:
    """Write measurements as JSON, with a sentence `about` what was measured on what."""
    path.write_text(json.dumps({"about": about, "steps": [list(s) for s in measured]}, indent=1))


def _clip(residuals: Array, limit: float) -> Array:
    return np.minimum(np.maximum(residuals, -limit), limit)


def _next_row(batches: Sequence[int], seconds: Array, rising: Sequence[Sequence[int]]) -> Array:
    """Step times of the last of `batches`, from those of the batches before it, [arms]."""
    if len(batches) == 2:
        return seconds[-1]
    step = (batches[-1] - batches[-2]) / (batches[-2] - batches[-3])
    slope = np.maximum(seconds[-1] - seconds[-2], 0.0)
    row = seconds[-1] + step * slope
    for columns in rising:
        # More nodes grow faster; noise in the last two rows must not turn that round.
        faster = seconds[-1, columns] + step * np.maximum.accumulate(slope[columns])
        row[columns[1:]] = np.maximum.accumulate(faster)[1:]
    return row


def _fill(
    batches: npt.NDArray[np.int64],
    arms: Sequence[Arm],
    rising: Sequence[Sequence[int]],
    median: dict[tuple[int, Arm], float],
) -> Array:
    """The cells of all arms, [batches, arms]: what is not measured lies between what is."""
    columns: dict[Arm, Array] = {}
    for arm in {arm for _, arm in median}:
        known = [batch for batch in batches if (batch, arm) in median]
        columns[arm] = np.interp(batches, known, [median[batch, arm] for batch in known])
    filled = np.empty((len(batches), len(arms)))
    for group in rising:
        proposers = PLAIN.proposer, arms[group[-1]].proposer
        measured = sorted((a for a in columns if a.proposer in proposers), key=lambda a: a.nodes)
        measured = measured or list(columns)[:1]
        wanted, nodes = [arms[i].nodes for i in group], [arm.nodes for arm in measured]
        for row, seconds in enumerate(np.stack([columns[arm] for arm in measured], axis=1)):
            filled[row, group] = np.interp(wanted, nodes, seconds)
    return filled
