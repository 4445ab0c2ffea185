"""A serving engine reduced to what the width policy sees: batches, accepted tokens, step times."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scenario:
    """A workload: who is served, how well the drafter does, what a step costs."""

    name: str
    block_size: int
    duration: float  # seconds
    seconds: Callable[[int, int], float]  # true mean step time of (batch, width)
    concurrency: Callable[[float], int]  # of progress through the run, 0 .. 1
    level: Callable[[float], float]  # acceptance logit of position 1, of progress
    slope: float = -0.1  # logit per further position
    tilts: tuple[tuple[float, float], ...] = ((1.0, 0.0),)  # (share of requests, tilt)
    tilt_noise: float = 0.3
    lengths: tuple[int, int] = (32, 256)  # tokens of an answer, uniform
    time_noise: float = 0.05
    stall: tuple[float, float] = (0.01, 4.0)  # (probability, factor)
    busy: tuple[float, int, float] = (0.0, 0, 1.0)  # (probability, steps, factor): other work
    seed_noise: float = 0.05  # error of the start-up measurements
    slowdown: Callable[[float], float] = field(default=lambda progress: 1.0)
    slow_start: int = 0  # so many steps with drafts take half as long again at first
    context: Callable[[float], float] = field(default=lambda progress: 0.0)  # in plain steps

    def step_seconds(self, batch: int, width: int, progress: float) -> float:
        """True mean step time."""
        context = self.context(progress) * self.seconds(batch, 1)
        return (self.seconds(batch, width) + context) * self.slowdown(progress)


@dataclass
class Request:
    rid: int
    tilt: float
    remaining: int


class World:
    """One run of a scenario. The same seed serves the same requests whatever the widths."""

    def __init__(self, scenario: Scenario, seed: int):
        self.scenario = scenario
        self._requests = np.random.default_rng([seed, 0])
        self._luck = np.random.default_rng([seed, 1])
        self._served = 0
        self._drafted = 0  # steps
        self._busy = 0  # steps that other work still takes the machine from us
        self.batch: list[Request] = []
        self.finished: list[int] = []

    def admit(self, progress: float) -> None:
        """Fill the batch up to the present concurrency; shrink it only as requests finish."""
        shares, tilts = zip(*self.scenario.tilts, strict=True)
        while len(self.batch) < self.scenario.concurrency(progress):
            rng = self._requests
            tilt = rng.choice(tilts, p=np.array(shares) / sum(shares))
            tilt += self.scenario.tilt_noise * rng.standard_normal()
            length = int(rng.integers(*self.scenario.lengths))
            self.batch.append(Request(self._served, float(tilt), length))
            self._served += 1

    def survival(self, progress: float) -> Array:
        """Probability that token k of a step is committed, [bs, block_size]; k = 0 always is."""
        scenario = self.scenario
        position = np.arange(scenario.block_size - 1)
        tilt = np.array([request.tilt for request in self.batch])
        logit = scenario.level(progress) + scenario.slope * position + tilt[:, None]
        survival = np.ones((len(self.batch), scenario.block_size))
        np.cumprod(1 / (1 + np.exp(-logit)), axis=1, out=survival[:, 1:])
        remaining = np.array([request.remaining for request in self.batch])
        return survival * (np.arange(scenario.block_size) < remaining[:, None])

    def step(self, width: int, survival: Array, progress: float) -> tuple[list[int], float]:
        """Verify `width` tokens of each request; return commit lengths and measured seconds."""
        scenario = self.scenario
        draw = self._luck.random(len(self.batch))
        # Inverse transform of the commit length; the draw does not depend on the width.
        commit = 1 + (draw[:, None] < survival[:, 1:width]).sum(axis=1)
        seconds = scenario.step_seconds(len(self.batch), width, progress)
        seconds *= float(np.exp(scenario.time_noise * self._luck.standard_normal()))
        self._drafted += width > 1
        if width > 1 and self._drafted <= scenario.slow_start:
            seconds *= 1.5
        probability, lasting, factor = scenario.busy
        if not self._busy and self._luck.random() < probability:
            self._busy = lasting
        if self._busy:
            self._busy -= 1
            seconds *= factor
        if self._luck.random() < scenario.stall[0]:
            seconds *= scenario.stall[1]
        self.finished = []
        for request, tokens in zip(self.batch, commit.tolist(), strict=True):
            request.remaining -= tokens
            if request.remaining <= 0:
                self.finished.append(request.rid)
        self.batch = [request for request in self.batch if request.remaining > 0]
        return commit.tolist(), seconds
