"""A serving engine reduced to what the policy sees: batches, accepted tokens, step times."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from dflare.adaptive import PLAIN, Arm, Comparison
from dflare.ops import build_draft_tree, walk_draft_tree

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LEAST = 3  # tokens of the shortest match
_CHANCE_RIGHT = 0.3  # that a token behind a short match by chance is right
DRAFTED = ("chain", "tree")  # proposers with a draft pass


@dataclass(frozen=True)
class Scenario:
    """A workload: who is served, how well the drafter does, what a step costs."""

    name: str
    block_size: int
    duration: float  # seconds
    seconds: Callable[[int, Arm], float]  # true mean step time of (batch, arm)
    concurrency: Callable[[float], int]  # of progress through the run, 0 .. 1
    level: Callable[[float], float]  # acceptance logit of position 1, of progress
    slope: float = -0.1  # logit per further position
    tilts: tuple[tuple[float, float], ...] = ((1.0, 0.0),)  # (share of requests, tilt)
    tilt_noise: float = 0.3
    second: float = 0.35  # that a token is right if all better ones of its depth are not
    # Passages copied from earlier text: (probability that one begins, a token; mean tokens).
    copying: tuple[float, float] = (0.0, 1.0)
    chance: float = 0.1  # of a short match that means little
    lengths: tuple[int, int] = (32, 256)  # tokens of an answer, uniform
    time_noise: float = 0.05
    stall: tuple[float, float] = (0.01, 4.0)  # (probability, factor)
    busy: tuple[float, int, float] = (0.0, 0, 1.0)  # (probability, steps, factor): other work
    seed_noise: float = 0.05  # error of the start-up measurements
    slowdown: Callable[[float], float] = field(default=lambda progress: 1.0)
    slow_start: int = 0  # so many steps with drafts take half as long again at first
    context: Callable[[float], float] = field(default=lambda progress: 0.0)  # in plain steps

    def step_seconds(self, batch: int, arm: Arm, progress: float) -> float:
        """True mean step time."""
        context = self.context(progress) * self.seconds(batch, PLAIN)
        return (self.seconds(batch, arm) + context) * self.slowdown(progress)


@dataclass
class Request:
    rid: int
    tilt: float
    remaining: int
    passage: int = 0  # tokens left of a copied one
    copied: int = 0  # tokens of it so far
    chance: bool = False  # whether there is a short match behind the latest token


@dataclass(frozen=True)
class Tree:
    """One request a row.

    Attributes:
        tokens, parents, depths: As `build_draft_tree` gives them; a token is called by its rank.
        reached: Chance of each node's prefix to be right, [bs, nodes].
        chances: Of each rank of each depth to be right, [bs, depths, ranks].
        remaining: Tokens that requests may still produce, [bs].
    """

    tokens: Ints
    parents: npt.NDArray[np.int32]
    depths: npt.NDArray[np.int32]
    reached: npt.NDArray[np.float32]
    chances: Array
    remaining: Ints

    def expected_tokens(self) -> Array:
        """Of the first so many nodes of each tree, the anchor included: [bs, nodes]."""
        return np.cumsum(self.reached * (self.depths < self.remaining[:, None]), axis=1)

    def accepted(self, luck: np.random.Generator) -> Ints:
        """Drawn numbers of right drafts, [bs]."""
        draw = luck.random(self.chances.shape[:2])[..., None]
        right = (draw >= np.cumsum(self.chances, axis=2)).sum(axis=2)  # a rank, or none of them
        said = np.pad(right, ((0, 0), (0, 1)), constant_values=-1)
        said = np.take_along_axis(said, self.depths.astype(np.int64), axis=1)
        _, lens, _ = walk_draft_tree(
            *(torch.from_numpy(x) for x in (self.tokens, self.parents, said)),
            int(self.depths.max()) + 1,
        )
        return np.minimum(lens.numpy(), self.remaining) - 1


class World:
    """One run of a scenario. The same seed serves the same requests whatever the widths."""

    def __init__(self, scenario: Scenario, seed: int):
        self.scenario = scenario
        self._requests = np.random.default_rng([seed, 0])
        self._luck = np.random.default_rng([seed, 1])
        self._served = 0
        self._drafted = 0  # steps
        self._busy = 0  # steps that other work still takes the machine from us
        self._copying = np.random.default_rng([seed, 2])
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

    def best_right(self, progress: float) -> Array:
        """Probability that the best token of each depth is right, [bs, block_size - 1]."""
        scenario = self.scenario
        position = np.arange(scenario.block_size - 1)
        tilt = np.array([request.tilt for request in self.batch])
        logit = scenario.level(progress) + scenario.slope * position + tilt[:, None]
        return 1 / (1 + np.exp(-logit))

    def survival(self, progress: float) -> Array:
        """Probability that token k of a step is committed, [bs, block_size]; k = 0 always is."""
        survival = np.ones((len(self.batch), self.scenario.block_size))
        np.cumprod(self.best_right(progress), axis=1, out=survival[:, 1:])
        return survival * (np.arange(self.scenario.block_size) < self._remaining()[:, None])

    def tree(self, progress: float, nodes: int) -> "Tree":
        """The drafter's trees of so many verified tokens; look-ups are no branches here."""
        right = self.best_right(progress)[..., None]
        rank = np.arange(max(nodes - 1, 1))
        # What a drafter calls the best is never less likely than the second.
        second = np.minimum(self.scenario.second, right / (1 - right))
        chances = np.where(rank, (1 - right) * second * (1 - second) ** (rank - 1), right)
        anchors = torch.zeros(len(right), dtype=torch.long)
        scores = torch.empty(len(right), nodes)
        grown = build_draft_tree(anchors, *_ranked(chances), nodes - 1, scores=scores)
        return Tree(*(x.numpy() for x in (*grown, scores.exp())), chances, self._remaining())

    def _remaining(self) -> Ints:
        return np.array([request.remaining for request in self.batch])

    def matches(self) -> Ints:
        """Tokens that each request's look-up matches, [bs]; 0 where it finds nothing."""
        return np.array(
            [_LEAST + r.copied if r.passage else _LEAST * r.chance for r in self.batch], dtype=int
        )

    def look_ups(self, block_size: int) -> Array:
        """Probability that token k of a step is what a look-up proposes, [bs, block_size]."""
        k = np.arange(block_size)
        passage = np.array([request.passage for request in self.batch])
        found = np.where(passage[:, None], k <= passage[:, None], _CHANCE_RIGHT**k)
        found[self.matches() == 0, 1:] = 0.0
        return found * (k < self._remaining()[:, None])

    def step(
        self, arm: Arm, survival: Array, progress: float, splice: int = 1 << 30
    ) -> tuple[list[int], float, Comparison]:
        """Run a step; return commit lengths, measured seconds, and what proposals were worth."""
        scenario, nodes = self.scenario, arm.nodes
        draw = self._luck.random(len(self.batch))
        # Inverse transform of the commit length; the draw does not depend on the arm.
        drafts = (draw[:, None] < survival[:, 1:]).sum(axis=1)
        found = (draw[::-1, None] < self.look_ups(survival.shape[1])[:, 1:]).sum(axis=1)
        match = self.matches()
        agreed = np.minimum(drafts, found) if arm.proposer == "chain" else np.full_like(match, -1)
        spliced = (match > 0) & (match + agreed >= splice)
        hits = np.where(spliced, found, drafts) if arm.proposer == "chain" else found
        if arm.proposer == "tree":
            hits = self.tree(progress, nodes).accepted(self._luck)
        commit = 1 + np.minimum(hits, nodes - 1)
        seen = Comparison(match, np.minimum(found, commit), agreed, np.minimum(drafts, commit))
        seconds = scenario.step_seconds(len(self.batch), arm, progress)
        seconds *= float(np.exp(scenario.time_noise * self._luck.standard_normal()))
        self._drafted += arm.proposer in DRAFTED
        if arm.proposer in DRAFTED and self._drafted <= scenario.slow_start:
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
            self._copy_on(request, tokens)
            if request.remaining <= 0:
                self.finished.append(request.rid)
        self.batch = [request for request in self.batch if request.remaining > 0]
        return commit.tolist(), seconds, seen

    def _copy_on(self, request: Request, tokens: int) -> None:
        """Go on in a copied passage, or begin one now and then."""
        begins, length = self.scenario.copying
        if request.passage:
            request.passage = max(request.passage - tokens, 0)
            request.copied = request.copied + tokens if request.passage else 0
        elif self._copying.random() < 1 - (1 - begins) ** tokens:
            request.passage = 1 + int(self._copying.exponential(length))
        request.chance = bool(self._copying.random() < self.scenario.chance)


def _ranked(chances: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, called by their rank, and log-probabilities as `build_draft_tree` takes them."""
    log_probs = torch.from_numpy(np.log(chances)).float()
    return torch.arange(chances.shape[2]).expand(log_probs.shape).contiguous(), log_probs
