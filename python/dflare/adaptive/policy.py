"""Choose before each decode step who proposes tokens, and how many the target shall verify.

The arm that maximises expected committed tokens per second for the batch as it is now:
expected tokens from :mod:`dflare.adaptive.acceptance`, step time from
:mod:`dflare.adaptive.cost`. The policy does not touch an engine and is deterministic.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dflare.adaptive.acceptance import AcceptanceModel, Prior
from dflare.adaptive.arms import Arm
from dflare.adaptive.config import AdaptiveConfig
from dflare.adaptive.cost import CostTable
from dflare.adaptive.lookup import NO_LOOKUPS, Comparison, LookupRule, SpliceRule
from dflare.adaptive.standing import Standing

_CREDIT_STEPS = 5.0  # exploration saved up at most, in step times
_TRIALS = 8  # decisions at most that a new server takes for an arm that start-up may have wronged
_LEAST_CHARGE = 0.05  # of a step, for exploring what is nearly as good: no end of it else
_PROBE_EVERY = 0.1  # of the memory: without any draft for so long, one is tried without hope
_HOLD = 8  # steps per decision: thinking costs up to 1 % of a step, and one step changes little
# Most text does not repeat what came before; what does goes on doing it, and then ends at once.
_LOOKUP_PRIOR, _LOOKUP_RISE = 0.2, 1.5
_LOOKUP_REQUEST_MEMORY = 300
_DRAFTED = ("chain", "tree")  # proposers with a draft pass
# Tokens of a request's look-up that pay, before any was seen, and requests' steps until the mean
# has forgotten one: copying begins and ends.
_FIRST_WORTH, _WORTH_MEMORY = 1.0, 32


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do in one step, and what the policy expects of it."""

    arm: Arm
    rule: LookupRule
    request_ids: tuple[Hashable, ...]
    exploring: bool
    expected_tokens: float
    predicted_seconds: float


class _Results(NamedTuple):
    """Of steps of one decision, in their order: not every step has a time or a comparison."""

    commit_lens: list[Sequence[int]]
    seconds: list[float]
    verified: list[int]  # tokens of the steps that have a time
    seen: list[tuple[Comparison, Sequence[int]]]


class ArmPolicy:
    """Pick the arm of each decode step and learn from what came of it.

    The engine calls :meth:`choose` before a step, :meth:`observe` when its commit lengths are
    known (under overlap scheduling a step or two later) and :meth:`finish` when a request ends.
    With tensor parallelism one rank decides for all: step times differ between ranks.
    """

    def __init__(self, config: AdaptiveConfig, cost: CostTable):
        self.config = config
        self.cost = cost
        self.arms = config.arms
        largest = config.widths[-1]
        self._longest = max((arm.nodes for arm in self.arms if arm.proposer == "lookup"), default=1)
        self._worth = _FIRST_WORTH  # tokens of a request's look-up that pay, in the mean
        priors: dict[str, Prior] = {}
        self._splice = None
        if "chain" in config.proposers:
            priors["chain"] = Prior()
        if "lookup" in config.proposers:
            priors["lookup"] = Prior(_LOOKUP_PRIOR, _LOOKUP_RISE, _LOOKUP_REQUEST_MEMORY)
            self._splice = SpliceRule(config.memory)
        # Each tree has its own acceptance of a depth: by how many nodes it has there.
        priors |= {str(arm): Prior() for arm in self.arms if arm.proposer == "tree"}
        self._most = np.array([config.most(arm) for arm in self.arms])
        most = max(largest, int(self._most.max()))
        self._acceptance = AcceptanceModel(most, config.memory, list(priors.values()))
        self._rows = {name: row for row, name in enumerate(priors)}
        self._nodes = np.array([arm.nodes for arm in self.arms])
        # Where requests may differ, one look-up arm has whatever pays, of each. The times of the
        # others say what fewer tokens cost.
        self._shared = np.array([a.proposer == "lookup" and config.ragged for a in self.arms])
        self._chosen = ~self._shared | (self._nodes == self._longest)
        self._sizes = np.unique(self._nodes)
        # Where an arm's expected tokens stand in those of all proposers.
        self._row = np.array([self._rows.get(_model(arm), 0) for arm in self.arms])
        self._current = 0
        self._gain = 0.0
        first = _CREDIT_STEPS if config.explore else 0.0
        self._credit = first * float(cost.seconds(1)[0])
        self._decided = [0] * len(self.arms)  # how often for each arm
        self._drafts = np.array([arm.proposer in _DRAFTED for arm in self.arms])
        self._undrafted = 0
        self._held: Decision | None = None
        self._standing = Standing()  # of the held decision
        # Results of the held decision from which nothing was learned yet.
        self._results = _Results([], [], [], [])

    def choose(self, request_ids: Sequence[Hashable], remaining: Sequence[int]) -> Decision:
        """Choose the arm of the next step.

        Args:
            request_ids: The batch's requests, at least one.
            remaining: Tokens that each may still produce, at least 1 each.

        Returns:
            The decision, to be handed back to :meth:`observe`.
        """
        ids = tuple(request_ids)
        held = self._held
        if held and self._standing.goes_on(ids, remaining):
            self._count(held)
            return held
        self._learn()
        left = np.asarray(remaining, dtype=np.int64)
        tokens, hoped = (
            values[self._row, self._most - 1]
            for values in self._acceptance.expected_tokens(request_ids, left)
        )
        seconds = self.cost.seconds(len(request_ids), self._verified_nodes())
        # Nothing beyond the first size that finishes every request.
        sizes = self._sizes
        usable = self._nodes <= sizes[min(np.searchsorted(sizes, left.max()), len(sizes) - 1)]
        usable = (usable | self._shared) & self._chosen
        rates = np.where(usable, tokens / seconds, 0.0)
        best = self._settle(rates)

        loss = np.maximum(seconds - tokens / rates[best], _LEAST_CHARGE * seconds)
        doubted = seconds * self.cost.doubt(len(request_ids), best)
        trial = self._next_trial(np.where(usable, tokens / doubted, 0.0), rates[best])
        hopes = hoped / doubted
        hopes[~usable | (loss >= self._credit)] = 0.0
        overdue = (
            not self._drafts[best]
            and self._drafts.any()
            and self._undrafted > self.config.memory * _PROBE_EVERY
        )
        if overdue:
            hopes[~self._drafts] = 0.0
        chosen = int(hopes.argmax())
        if trial is not None:
            chosen = trial
        elif chosen != best and hopes[chosen] > (0.0 if overdue else rates[best]):
            self._credit -= float(loss[chosen])
        else:
            chosen = best
        self._decided[chosen] += 1
        decision = Decision(
            arm=self.arms[chosen],
            rule=self._rule(len(request_ids), float(rates[best])),
            request_ids=ids,
            exploring=chosen != best,
            expected_tokens=float(tokens[chosen]),
            predicted_seconds=float(seconds[chosen]),
        )
        self._count(decision)
        self._held = decision
        self._standing.begin(ids, decision.arm.nodes, _HOLD if chosen == best else 1)
        return decision

    @property
    def standing(self) -> int:
        """Steps for which the latest decision is meant to stand, the next one to run included.

        Other requests, or fewer tokens left than its nodes, end it earlier.
        """
        return self._standing.left + 1

    def observe(
        self,
        decision: Decision,
        commit_lens: Sequence[int],
        seconds: float | None = None,
        seen: Comparison | None = None,
        verified: int | None = None,
    ) -> None:
        """Learn from a step.

        Args:
            decision: What :meth:`choose` returned for it.
            commit_lens: Committed tokens of each request of the decision, at least 1, at most
                what one may verify.
            seconds: How long the step took; None where that is not known, as when a prefill
                ran in between.
            seen: What the look-up would have got, and the drafter alone, where that is known.
            verified: Tokens of all requests; the arm's nodes of each by default.
        """
        results = self._results if decision is self._held else _Results([], [], [], [])
        results.commit_lens.append(commit_lens)
        if seconds is not None:
            results.seconds.append(seconds)
            results.verified.append(verified or len(commit_lens) * decision.arm.nodes)
        if seen is not None:
            results.seen.append((seen, commit_lens))
        if decision is not self._held:
            self._learn_from(decision, results)

    def finish(self, request_id: Hashable) -> None:
        """Forget a request that ended; unknown ones are ignored."""
        self._acceptance.finish(request_id)

    def accept_rates(self) -> list[float]:
        """Estimated acceptance of each drafted position that is reached, from position 1 on."""
        row = self._rows.get("chain")
        positions = self.config.widths[-1] - 1
        return [] if row is None else self._acceptance.conditional(row)[:positions].tolist()

    def _learn(self) -> None:
        """Learn at once from all steps of the held decision."""
        if self._held and self._results.commit_lens:
            self._learn_from(self._held, self._results)
        self._results = _Results([], [], [], [])

    def _learn_from(self, decision: Decision, results: _Results) -> None:
        ids, arm = decision.request_ids, decision.arm
        self._acceptance.age(ids, len(results.commit_lens))
        if "lookup" in self._rows and results.seen:
            right = np.array([np.minimum(seen.right, seen.worth) for seen, _ in results.seen])
            known = np.array([commit_lens for _, commit_lens in results.seen])
            self._acceptance.observe(self._rows["lookup"], ids, self._longest - 1, right, known)
        row = self._rows.get(_model(arm))
        if row is not None and not (arm.proposer == "lookup" and results.seen):
            accepted = np.array(results.commit_lens) - 1
            self._acceptance.observe(row, ids, self.config.most(arm) - 1, accepted)
        if self._splice:
            for seen, _ in results.seen:
                self._splice.observe(seen, arm.nodes - 1)
                part = len(ids) / (len(ids) + _WORTH_MEMORY)
                self._worth += part * (float(np.mean(seen.worth)) - self._worth)
        if results.seconds:
            nodes = sum(results.verified) / len(results.verified) / len(ids)
            self.cost.observe(len(ids), arm, results.seconds, nodes)

    def _verified_nodes(self) -> np.ndarray | None:
        """Tokens of a request that each arm verifies in the mean; None if what it is called by."""
        if not self._shared.any():
            return None
        return np.where(self._shared, 1 + self._worth, self._nodes)

    def _rule(self, batch: int, rate: float) -> LookupRule:
        """Which look-ups a step of so many requests verifies, at so many tokens a second.

        A token more pays if what it gives, its probability to be right, is more than what is given
        elsewhere in the time it takes.
        """
        if not self._splice:
            return NO_LOOKUPS
        splice, odds = self._splice.least_strength(), 0
        if self._shared.any():
            longest = self.arms[int((self._shared & self._chosen).argmax())]
            odds = min(round(1000 * rate * self.cost.of_a_node(batch, longest)), 999)
        return LookupRule(splice, odds)

    def _count(self, decision: Decision) -> None:
        """Book a step: how long ago the last draft was, and what may be spent on exploring."""
        self._undrafted = 0 if decision.arm.proposer in _DRAFTED else self._undrafted + 1
        seconds = decision.predicted_seconds
        if self._credit < _CREDIT_STEPS * seconds:
            self._credit += self.config.explore * seconds

    def _next_trial(self, rates: np.ndarray, least: float) -> int | None:
        """Index of the arm that a new server tries now, between decisions for the best one.

        Args:
            rates: Of each arm, if start-up has measured its steps as much too long as it may have.
            least: What the best arm gives.
        """
        if not self.config.explore or self._held is None or self._held.exploring:
            return None
        few = np.array(self._decided) < _TRIALS
        if few[0]:  # the plain step, against which all others are held
            return 0
        trial = int(np.where(few, rates, 0.0).argmax())
        return trial if few[trial] and rates[trial] > least else None

    def _settle(self, rates: np.ndarray) -> int:
        """Index of the arm to use, changed only when the predicted gain has piled up."""
        best = int(rates.argmax())
        if not rates[self._current]:
            self._current, self._gain = best, 0.0
        elif best == self._current:
            self._gain = 0.0
        else:
            self._gain += math.log(rates[best] / rates[self._current])
            if self._gain > self.config.patience:
                self._current, self._gain = best, 0.0
        return self._current


def _model(arm: Arm) -> str:
    """Name of the model that knows what an arm's proposals are worth."""
    return str(arm) if arm.proposer == "tree" else arm.proposer
