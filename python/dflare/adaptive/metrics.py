"""What speculation did, for Prometheus and for the server log.

All metrics of this package are defined here. Create :class:`SpecMetrics` in the scheduler
process, after SGLang has set ``PROMETHEUS_MULTIPROC_DIR``: prometheus_client looks at it when it
is first imported, and SGLang's ``/metrics`` endpoint collects the files that every process writes
there (sglang/srt/observability/metrics_collector.py).
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dflare.adaptive.arms import PLAIN, Arm
from dflare.adaptive.lookup import NO_LOOKUPS, Comparison, Ints, LookupRule
from dflare.adaptive.watch import AcceptanceWatch

_INTERVAL = 1.0  # seconds between writes; steps in between only count in Python


class SpecMetrics:
    """Counts verified steps and publishes them about once a second, and when nothing runs any more.

    =============================== ========= ====================================================
    dflare_verify_width             gauge     verified tokens per request and step
    dflare_accept_length            gauge     committed tokens per request and step
    dflare_accept_rate_position     gauge     estimated acceptance of a drafted position that is
                                              reached, label ``position`` from 1
    dflare_step_seconds_predicted   gauge     what the policy expected its steps to take, mean
    dflare_step_seconds_actual      gauge     what the same steps took, mean
    dflare_verify_steps_total       counter   decode steps, label ``width``
    dflare_exploring_steps_total    counter   of these, taken to learn rather than to earn
    dflare_request_steps_total      counter   requests summed over decode steps
    dflare_verified_tokens_total    counter   tokens verified by decode steps: anchors and drafts
    dflare_committed_tokens_total   counter   tokens committed by decode steps
    dflare_drafts_reached_total     counter   drafted tokens whose predecessors in the block were
                                              all accepted, label ``position`` from 1
    dflare_drafts_accepted_total    counter   of these, accepted
    dflare_accepted_tokens_total    counter   proposals accepted, label ``proposer``: ``chain`` for
                                              the drafter, ``lookup`` for the text so far, ``tree``
                                              for both in one tree
    dflare_acceptance_low           gauge     1 while hardly any first draft is accepted
    =============================== ========= ====================================================
    """

    def __init__(
        self, labels: Mapping[str, str] | None, report: Callable[[str], None] = lambda _: None
    ):
        """
        Args:
            labels: Constant labels, as SGLang's collectors carry (model_name, tp_rank, ...);
                None leaves Prometheus alone and gives the lines for the log only.
            report: Takes the line about a drafter that hardly ever guesses right, once.
        """
        self._watch = AcceptanceWatch(report)
        self._gauges = None if labels is None else _Gauges(labels)
        self._since = time.perf_counter()
        self._clear()

    def record(
        self,
        arm: Arm,
        commit_lens: Sequence[int],
        seen: Comparison | None = None,
        *,
        rule: LookupRule = NO_LOOKUPS,
        exploring: bool = False,
        predicted: float | None = None,
        actual: float | None = None,
        verified: int | None = None,
    ) -> None:
        """Count one decode step.

        Args:
            arm: What was verified.
            commit_lens: Committed tokens of each request.
            seen: What the look-up and the drafter alone would have got, where that is known.
            rule: Which look-ups were verified.
            exploring: Whether the policy called the arm slower than another.
            predicted, actual: Step time in seconds; counted where both are known.
            verified: Tokens of all requests; the arm's nodes of each by default.
        """
        if arm.proposer == "chain":
            first = commit_lens if seen is None else (seen.drafted + 1).tolist()
            self._watch.observe(first)
        self._by_width[arm.nodes] += 1
        self._verified += verified or len(commit_lens) * arm.nodes
        self._explored += exploring
        self._commits[arm.nodes].update(commit_lens)
        self._count_by_proposer(arm, np.asarray(commit_lens) - 1, seen, rule)
        if predicted is not None and actual is not None:
            self._timed += 1
            self._predicted_sum += predicted
            self._actual_sum += actual

    def _count_by_proposer(
        self, arm: Arm, accepted: Ints, seen: Comparison | None, rule: LookupRule
    ) -> None:
        """Tell apart whose proposals were accepted; what both proposed counts as the drafter's."""
        if arm == PLAIN:
            return
        total = int(accepted.sum())
        if arm.proposer == "chain" and seen is not None:
            agreed = np.minimum(seen.agreed, accepted)
            looked_up = int((accepted - agreed)[seen.strength() >= rule.splice].sum())
            self._by_proposer["lookup"] += looked_up
            total -= looked_up
        self._by_proposer[arm.proposer] += total

    def publish(
        self, accept_rates: Callable[[], Sequence[float]], idle: bool = False
    ) -> str | None:
        """Write the metrics if the interval is over, or nothing runs that could do it later.

        Args:
            accept_rates: Gives the estimated acceptance by position, ``ArmPolicy.accept_rates``;
                nothing without a policy.
            idle: Whether every request has ended: the counters are then complete.

        Returns:
            A line for the server log about the steps since the last write, at most one an interval;
            None if it was not yet time or nothing ran.
        """
        now = time.perf_counter()
        due = now - self._since >= _INTERVAL
        if not self._by_width or not (due or idle):
            return None
        requests = {width: lengths.total() for width, lengths in self._commits.items()}
        request_steps = sum(requests.values())
        committed = sum(
            length * count
            for lengths in self._commits.values()
            for length, count in lengths.items()
        )
        width = self._verified / request_steps
        accept = committed / request_steps
        line = f"verify width {width:.2f}, accept length {accept:.2f}"
        times = None
        if self._timed:
            times = self._predicted_sum / self._timed, self._actual_sum / self._timed
            line += f", step {1e3 * times[1]:.2f} ms (predicted {1e3 * times[0]:.2f})"
        reached, accepted = _positions(self._commits)
        if reached:
            rates = (accepted[position] / drafts for position, drafts in sorted(reached.items()))
            line += ", acceptance by position " + " ".join(f"{rate:.2f}" for rate in rates)
        if self._gauges:
            self._gauges.write(width, accept, accept_rates(), times)
            self._gauges.low.set(self._watch.low)
            self._gauges.count_positions(reached, accepted)
            self._gauges.count_proposers(self._by_proposer)
            self._gauges.count(
                self._by_width,
                self._explored,
                request_steps,
                self._verified,
                committed,
            )
        self._clear()
        if not due:
            return None
        self._since = now
        return line

    def _clear(self) -> None:
        self._by_width: Counter[int] = Counter()
        self._by_proposer: Counter[str] = Counter()  # accepted tokens
        # Of each width, requests by the tokens that they committed.
        self._commits: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self._explored = self._timed = self._verified = 0
        self._predicted_sum = self._actual_sum = 0.0


def _positions(commits: Mapping[int, Mapping[int, int]]) -> tuple[Counter[int], Counter[int]]:
    """Drafted tokens that were reached and accepted, by position from 1, of all widths together."""
    reached: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for width, lengths in commits.items():
        for committed, requests in lengths.items():
            # The last committed token is the target's own; a draft in its place was rejected. A
            # width that is a mean says nothing of a request that commits as many.
            reached_here = committed if committed < width else committed - 1
            for position in range(1, reached_here + 1):
                reached[position] += requests
                accepted[position] += requests * (position < committed)
    return reached, accepted


class _Gauges:
    """The metrics in prometheus_client."""

    def __init__(self, labels: Mapping[str, str]):
        from prometheus_client import Counter as Metric
        from prometheus_client import Gauge

        self._labels = dict(labels)
        names = list(self._labels)

        def gauge(name: str, text: str, *extra: str) -> Gauge:
            return Gauge(f"dflare_{name}", text, [*names, *extra], multiprocess_mode="mostrecent")

        def counter(name: str, text: str, *extra: str) -> Metric:
            return Metric(f"dflare_{name}", text, [*names, *extra])

        bound = self._labels
        self._width = gauge("verify_width", "Verified tokens per request and step.").labels(**bound)
        self._accept = gauge("accept_length", "Tokens per request and step.").labels(**bound)
        self.low = gauge("acceptance_low", "Whether hardly any draft is accepted.").labels(**bound)
        self._position = gauge(
            "accept_rate_position", "Estimated acceptance of a reached position.", "position"
        )
        self._predicted = gauge("step_seconds_predicted", "Expected step time.").labels(**bound)
        self._actual = gauge("step_seconds_actual", "Measured step time.").labels(**bound)
        self._steps = counter("verify_steps", "Decode steps by verify width.", "width")
        self._exploring = counter("exploring_steps", "Steps that explored.").labels(**bound)
        self._requests = counter("request_steps", "Requests summed over steps.").labels(**bound)
        self._verified = counter("verified_tokens", "Tokens verified by steps.").labels(**bound)
        self._tokens = counter("committed_tokens", "Tokens committed by steps.").labels(**bound)
        self._reached = counter("drafts_reached", "Drafts behind accepted ones.", "position")
        self._accepted = counter("drafts_accepted", "Drafts accepted.", "position")
        self._proposed = counter("accepted_tokens", "Accepted, by who proposed.", "proposer")

    def write(
        self,
        width: float,
        accept: float,
        accept_rates: Sequence[float],
        times: tuple[float, float] | None,
    ) -> None:
        self._width.set(width)
        self._accept.set(accept)
        for position, rate in enumerate(accept_rates, start=1):
            self._position.labels(**self._labels, position=str(position)).set(rate)
        if times:
            self._predicted.set(times[0])
            self._actual.set(times[1])

    def count(
        self,
        by_width: Mapping[int, int],
        exploring: int,
        requests: int,
        verified: int,
        committed: int,
    ) -> None:
        for width, steps in by_width.items():
            self._steps.labels(**self._labels, width=str(width)).inc(steps)
        self._exploring.inc(exploring)
        self._requests.inc(requests)
        self._verified.inc(verified)
        self._tokens.inc(committed)

    def count_proposers(self, accepted: Mapping[str, int]) -> None:
        for proposer, tokens in accepted.items():
            self._proposed.labels(**self._labels, proposer=proposer).inc(tokens)

    def count_positions(self, reached: Mapping[int, int], accepted: Mapping[int, int]) -> None:
        for counter, counts in ((self._reached, reached), (self._accepted, accepted)):
            for position, drafts in counts.items():
                counter.labels(**self._labels, position=str(position)).inc(drafts)
