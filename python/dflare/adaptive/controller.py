"""Between the engine and the policy: matches steps with their results and times them."""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from dflare.adaptive.arms import Arm, chain
from dflare.adaptive.cost import StepTime
from dflare.adaptive.lookup import NO_LOOKUPS, Comparison, LookupRule
from dflare.adaptive.metrics import SpecMetrics
from dflare.adaptive.policy import ArmPolicy, Decision


@dataclass(slots=True)
class _Launched:
    decision: Decision | None
    arm: Arm
    batch: int
    timed: bool
    verified: int
    seen: Callable[[], Comparison] | None = None


class ArmController:
    """Says before each decode step which arm it is, and learns when its result is known.

    Results come in the order of the steps; under overlap scheduling one step late. A step's time is
    that from the previous result to its own: it holds everything that a step costs, scheduling and
    sampling included, and needs no device events. Only a step that follows another decode step
    directly has one.
    """

    def __init__(
        self,
        block_size: int,
        policy: ArmPolicy | None = None,
        metrics: SpecMetrics | None = None,
    ):
        """
        Args:
            block_size: Nodes of every step's chain if there is no policy.
            policy: Chooses the arms.
            metrics: Where to count steps, with or without a policy.
        """
        self._block_size = block_size
        self._policy = policy
        self._metrics = metrics
        self._launched: deque[_Launched] = deque()
        self._last_result: float | None = None
        self._gap = True
        self._unfinished = 0  # requests of the last step launched, less those that ended since

    def begin(
        self, request_ids: Sequence[Hashable], remaining: Sequence[int]
    ) -> tuple[Arm, LookupRule, int]:
        """Choose the decode step that is about to be launched.

        Args:
            request_ids: The batch's requests.
            remaining: Tokens that each may still produce.

        Returns:
            Its arm; which look-ups it verifies; and for how many steps the choice stands, this one
            included.
        """
        self._unfinished = len(request_ids)
        left = [max(tokens, 1) for tokens in remaining]
        decision = self._policy.choose(request_ids, left) if self._policy else None
        arm, rule, standing = chain(self._block_size), NO_LOOKUPS, 1
        if self._policy and decision:
            arm, rule, standing = decision.arm, decision.rule, self._policy.standing
        batch = len(request_ids)
        self._launched.append(_Launched(decision, arm, batch, not self._gap, batch * arm.nodes))
        self._gap = False
        return arm, rule, standing

    def compare(self, seen: Callable[[], Comparison]) -> None:
        """Give what the step just launched shows about proposals, to be called with its result."""
        if self._launched:
            self._launched[-1].seen = seen

    def verifies(self, tokens: int) -> None:
        """Say how many tokens the step just launched verifies, where its arm does not."""
        if self._launched:
            self._launched[-1].verified = tokens

    def interrupt(self) -> None:
        """A prefill is launched, or nothing runs: the next step's time says nothing about it."""
        self._gap = True

    def complete(self, commit_lens: Sequence[int]) -> str | None:
        """Take the result of the oldest step that has none yet.

        Args:
            commit_lens: Committed tokens of each request of that step.

        Returns:
            A line for the server log about once a second, else None. A result of another size than
            its step teaches nothing, and all steps in flight are forgotten with it.
        """
        now = time.perf_counter()
        step = self._launched.popleft() if self._launched else None
        seconds = now - self._last_result if step and step.timed and self._last_result else None
        self._last_result = now
        if (
            step is None
            or step.batch != len(commit_lens)
            or max(commit_lens) > self._most(step.arm)
        ):
            # Results and steps no longer match. That may cost speed, never a request.
            self._launched.clear()
            self._gap = True
            return None
        seen = step.seen() if step.seen else None
        if self._policy and step.decision:
            self._policy.observe(step.decision, commit_lens, seconds, seen, step.verified)
        if self._metrics is None:
            return None
        self._metrics.record(
            step.arm,
            commit_lens,
            seen,
            rule=step.decision.rule if step.decision else NO_LOOKUPS,
            exploring=step.decision.exploring if step.decision else False,
            predicted=step.decision.predicted_seconds if step.decision else None,
            actual=seconds,
            verified=step.verified,
        )
        return self._publish(self._metrics)

    def finish(self, request_id: Hashable) -> str | None:
        """A request ended.

        Returns:
            As :meth:`complete`.
        """
        self._unfinished -= 1
        if self._policy:
            self._policy.finish(request_id)
        return self._publish(self._metrics) if self._metrics and self._unfinished <= 0 else None

    def _most(self, arm: Arm) -> int:
        return self._policy.config.most(arm) if self._policy else arm.nodes

    def _publish(self, metrics: SpecMetrics) -> str | None:
        rates = self._policy.accept_rates if self._policy else tuple
        # Under overlap scheduling a step's result may come after its last request has ended.
        return metrics.publish(rates, idle=self._unfinished <= 0)


def measure_steps(
    run: Callable[[int, Arm], None],
    batches: Iterable[int],
    arms: Sequence[Arm],
    repeats: int = 3,
) -> list[StepTime]:
    """Time dummy decode steps at start-up, to seed a :class:`CostTable`.

    Args:
        run: Executes one step of (batch, arm) and waits for it.
        batches: Batch sizes, ascending; a generator may end them when it takes too long.
        arms: Arms to measure.
        repeats: Timed steps a cell, after one that is not timed. They go round all arms of a
            batch size, so that a busy moment does not fall on one arm.
    """
    measured: list[StepTime] = []
    for batch in batches:
        for arm in arms:
            run(batch, arm)
        for _ in range(repeats):
            for arm in arms:
                tic = time.perf_counter()
                run(batch, arm)
                measured.append(StepTime(batch, arm, time.perf_counter() - tic))
    return measured
