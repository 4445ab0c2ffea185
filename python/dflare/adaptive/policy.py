"""Choose before each decode step how many drafted tokens the target shall verify.

The width that maximises expected committed tokens per second for the batch as it is now:
expected tokens from :mod:`dflare.adaptive.acceptance`, step time from
:mod:`dflare.adaptive.cost`. The policy does not touch an engine and is deterministic.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from dflare.adaptive.acceptance import AcceptanceModel
from dflare.adaptive.config import AdaptiveConfig
from dflare.adaptive.cost import CostTable

_CREDIT_STEPS = 5.0  # exploration saved up at most, in step times
_TRIALS = 2  # decisions for each width that a new server takes: start-up measures some times wrong
_LEAST_CHARGE = 0.05  # of a step, for exploring what is nearly as good: no end of it else
_PROBE_EVERY = 0.1  # of the memory: without any draft for so long, one is tried without hope
_HOLD = 8  # steps per decision: thinking costs up to 1 % of a step, and one step changes little


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do in one step, and what the policy expects of it."""

    width: int
    request_ids: tuple[Hashable, ...]
    exploring: bool
    expected_tokens: float
    predicted_seconds: float


class WidthPolicy:
    """Pick the verify width of each decode step and learn from what came of it.

    The engine calls :meth:`choose` before a step, :meth:`observe` when its commit lengths are
    known (under overlap scheduling a step or two later) and :meth:`finish` when a request ends.
    With tensor parallelism one rank decides for all: step times differ between ranks.
    """

    def __init__(self, config: AdaptiveConfig, cost: CostTable):
        self.config = config
        self.cost = cost
        self.acceptance = AcceptanceModel(config.widths[-1], config.memory)
        self._index = np.array(config.widths) - 1
        self._current = 0
        self._gain = 0.0
        first = _CREDIT_STEPS if config.explore else 0.0
        self._credit = first * float(cost.seconds(1)[0])
        self._decided = [0] * len(config.widths)  # how often for each width
        self._undrafted = 0
        self._held: Decision | None = None
        self._hold = 0  # steps for which the held decision still stands
        # Results of the held decision from which nothing was learned yet.
        self._commit_lens: list[Sequence[int]] = []
        self._seconds: list[float] = []

    def choose(self, request_ids: Sequence[Hashable], remaining: Sequence[int]) -> Decision:
        """Choose the width of the next step.

        Args:
            request_ids: The batch's requests, at least one.
            remaining: Tokens that each may still produce, at least 1 each.

        Returns:
            The decision, to be handed back to :meth:`observe`.
        """
        ids = tuple(request_ids)
        held = self._held
        if held and self._hold and held.request_ids == ids and held.width <= max(remaining):
            self._hold -= 1
            self._count(held)
            return held
        self._learn()
        left = np.asarray(remaining, dtype=np.int64)
        tokens, hoped = self.acceptance.expected_tokens(request_ids, left)
        tokens, hoped = tokens[self._index], hoped[self._index]
        seconds = self.cost.seconds(len(request_ids))
        # Nothing beyond the first width that finishes every request.
        usable = int(np.searchsorted(self.config.widths, left.max())) + 1
        rates = (tokens / seconds)[:usable]
        best = self._settle(rates)

        loss = np.maximum(seconds - tokens / rates[best], _LEAST_CHARGE * seconds)[:usable]
        hopes = (hoped / (seconds * self.cost.doubt(len(request_ids), best)))[:usable]
        hopes[loss >= self._credit] = 0.0
        overdue = best == 0 and self._undrafted > self.config.memory * _PROBE_EVERY
        if overdue:
            hopes[0] = 0.0
        chosen = int(hopes.argmax())
        trial = self._next_trial(usable)
        if trial is not None:
            chosen = trial
        elif chosen != best and (overdue or hopes[chosen] > rates[best]):
            self._credit -= float(loss[chosen])
        else:
            chosen = best
        self._decided[chosen] += 1
        decision = Decision(
            width=self.config.widths[chosen],
            request_ids=ids,
            exploring=chosen != best,
            expected_tokens=float(tokens[chosen]),
            predicted_seconds=float(seconds[chosen]),
        )
        self._count(decision)
        self._held, self._hold = decision, _HOLD - 1 if chosen == best else 0
        return decision

    @property
    def standing(self) -> int:
        """Steps for which the latest decision is meant to stand, the next one to run included.

        Other requests, or fewer tokens left than its width, end it earlier.
        """
        return self._hold + 1

    def observe(
        self, decision: Decision, commit_lens: Sequence[int], seconds: float | None = None
    ) -> None:
        """Learn from a step.

        Args:
            decision: What :meth:`choose` returned for it.
            commit_lens: Committed tokens of each request of the decision, in ``1 .. width``.
            seconds: How long the step took; None where that is not known, as when a prefill
                ran in between.
        """
        times = [] if seconds is None else [seconds]
        if decision is self._held:
            self._commit_lens.append(commit_lens)
            self._seconds += times
        else:
            self._learn_from(decision, [commit_lens], times)

    def finish(self, request_id: Hashable) -> None:
        """Forget a request that ended; unknown ones are ignored."""
        self.acceptance.finish(request_id)

    def accept_rates(self) -> list[float]:
        """Estimated acceptance of each drafted position that is reached, from position 1 on."""
        return self.acceptance.conditional().tolist()

    def _learn(self) -> None:
        """Learn at once from all steps of the held decision."""
        if self._held and self._commit_lens:
            self._learn_from(self._held, self._commit_lens, self._seconds)
        self._commit_lens, self._seconds = [], []

    def _learn_from(
        self, decision: Decision, commit_lens: Sequence[Sequence[int]], seconds: Sequence[float]
    ) -> None:
        ids, width = decision.request_ids, decision.width
        self.acceptance.observe(ids, width, commit_lens)
        if seconds:
            self.cost.observe(len(ids), width, seconds)

    def _count(self, decision: Decision) -> None:
        """Book a step: how long ago the last draft was, and what may be spent on exploring."""
        self._undrafted = self._undrafted + 1 if decision.width == 1 else 0
        seconds = decision.predicted_seconds
        if self._credit < _CREDIT_STEPS * seconds:
            self._credit += self.config.explore * seconds

    def _next_trial(self, usable: int) -> int | None:
        """Index of the width that a new server tries now, between decisions for the best one."""
        if not self.config.explore or self._held is None or self._held.exploring:
            return None
        return next((i for i, n in enumerate(self._decided[:usable]) if n < _TRIALS), None)

    def _settle(self, rates: np.ndarray) -> int:
        """Index of the width to use, changed only when the predicted gain has piled up."""
        best = int(rates.argmax())
        if self._current >= len(rates):
            self._current, self._gain = best, 0.0
        elif best == self._current:
            self._gain = 0.0
        else:
            self._gain += math.log(rates[best] / rates[self._current])
            if self._gain > self.config.patience:
                self._current, self._gain = best, 0.0
        return self._current
