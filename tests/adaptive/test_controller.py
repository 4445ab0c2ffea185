import time

import pytest

from dflare.adaptive import (
    PLAIN,
    AdaptiveConfig,
    ArmController,
    ArmPolicy,
    CostTable,
    LookupRule,
    SpecMetrics,
    StepTime,
    chain,
    measure_steps,
)


class Clock:
    """Stands for time.perf_counter."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class CountingMetrics(SpecMetrics):
    """Metrics without Prometheus that remember what was recorded when they were last written."""

    def __init__(self):
        super().__init__(None)
        self.recorded = self.written = 0

    def record(self, arm, commit_lens, *more, **expected):
        self.recorded += sum(commit_lens)
        super().record(arm, commit_lens, *more, **expected)

    def publish(self, accept_rates, idle=False):
        if idle:
            self.written = self.recorded
        return super().publish(accept_rates, idle)


class RecordingPolicy(ArmPolicy):
    """A policy that also writes down which step times reach it."""

    def observe(self, decision, commit_lens, seconds=None, seen=None, verified=None):
        self.times = [*getattr(self, "times", []), seconds]
        super().observe(decision, commit_lens, seconds, seen, verified)


def make_policy():
    config = AdaptiveConfig.for_block_size(4, proposers=["chain"], explore=0.0)
    steps = [StepTime(n, a, 0.02) for n in (1, 4) for a in config.arms]
    return RecordingPolicy(config, CostTable(config.arms, steps))


def test_without_a_policy_every_step_verifies_the_block():
    controller = ArmController(block_size=8)
    assert controller.begin(["a", "b"], [100, 1]) == (chain(8), LookupRule(), 1)
    assert controller.complete([3, 1]) is None


def test_a_step_takes_from_the_previous_result_to_its_own(monkeypatch):
    clock, policy = Clock(monkeypatch), make_policy()
    controller = ArmController(4, policy)
    for result_at in (1.0, 1.25, 1.75):
        controller.begin(["a"], [100])
        clock.now = result_at
        controller.complete([1])
    assert policy.times == [None, 0.25, 0.5]


def test_a_step_behind_a_prefill_is_not_timed(monkeypatch):
    clock, policy = Clock(monkeypatch), make_policy()
    controller = ArmController(4, policy)
    for result_at in (1.0, 2.0, 3.0, 4.0):
        if result_at == 3.0:
            controller.interrupt()
        controller.begin(["a"], [100])
        clock.now = result_at
        controller.complete([1])
    assert policy.times == [None, 1.0, None, 1.0]


def test_results_that_come_one_step_late_meet_their_own_step(monkeypatch):
    """As under overlap scheduling: step 2 is launched before the result of step 1 is known."""
    clock, policy = Clock(monkeypatch), make_policy()
    controller = ArmController(4, policy)
    batches = [["a"], ["a", "b"], ["b"], ["b", "c", "d"]]
    controller.begin(batches[0], [100])
    for step, batch in enumerate(batches[1:], start=1):
        controller.begin(batch, [100] * len(batch))
        clock.now = float(step)
        controller.complete([1] * len(batches[step - 1]))
    controller.interrupt()
    clock.now = 4.5
    controller.complete([1, 1, 1])
    assert policy.times == [None, 1.0, 1.0, 1.5]


@pytest.mark.parametrize("result", [[1], [1, 5]], ids=["of another batch", "beyond the width"])
def test_a_result_that_cannot_be_its_steps_teaches_nothing_and_stops_nothing(result):
    policy = make_policy()
    controller = ArmController(4, policy)
    controller.begin(["a", "b"], [9, 9])
    before = policy.accept_rates()
    assert controller.complete(result) is None
    assert policy.accept_rates() == before
    controller.begin(["a"], [9])
    controller.complete([1])
    assert policy.times == [None]


def test_metrics_are_whole_once_the_last_request_has_ended():
    metrics = CountingMetrics()
    controller = ArmController(4, make_policy(), metrics)
    controller.begin(["a", "b"], [9, 9])
    controller.complete([1, 1])
    controller.finish("a")
    assert metrics.written == 0
    controller.begin(["b"], [8])
    controller.complete([1])
    controller.finish("b")
    assert metrics.written == 3


def test_a_step_that_was_in_flight_when_the_last_request_ended_is_counted_too():
    """As under overlap scheduling."""
    metrics = CountingMetrics()
    controller = ArmController(4, make_policy(), metrics)
    controller.begin(["a"], [9])
    controller.begin(["a"], [8])
    controller.complete([1])
    controller.finish("a")
    controller.complete([1])
    assert metrics.written == 2


def test_a_request_at_its_end_still_has_a_width():
    controller = ArmController(4, make_policy())
    assert controller.begin(["a"], [0])[0] == PLAIN


def test_start_up_steps_are_measured_round_the_arms(monkeypatch):
    clock = Clock(monkeypatch)
    ran = []

    def run(batch, arm):
        ran.append((batch, arm))
        clock.now += 0.01 * batch * arm.nodes

    round_1, round_2 = ([(batch, PLAIN), (batch, chain(4))] for batch in (1, 2))
    measured = measure_steps(run, [1, 2], [PLAIN, chain(4)], repeats=2)
    assert ran[:6] == round_1 * 3
    assert [tuple(step)[:2] for step in measured] == round_1 * 2 + round_2 * 2
    assert [step.seconds for step in measured[-2:]] == pytest.approx([0.02, 0.08])
