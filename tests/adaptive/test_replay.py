"""The replay of a drafter's real acceptance: what it serves, and its record against decoding."""

import pytest
from bench.policy import replay

from dflare.adaptive import AdaptiveConfig, ArmPolicy, CostTable, StepTime, chain


def seconds(batch, arm):
    return 0.01 + 0.001 * batch * arm.nodes


def test_a_width_commits_what_was_accepted_and_no_more_than_the_answer():
    traces = [[7, 6, 5, 4, 3, 2, 1, 0]]
    assert replay.serve(traces, 1, seconds, width=8) == pytest.approx(8 / seconds(1, chain(8)))
    # Of 4 tokens at a time.
    assert replay.serve(traces, 1, seconds, width=4) == pytest.approx(
        8 / (2 * seconds(1, chain(4)))
    )
    assert replay.serve([[0, 0, 0]], 1, seconds, width=8) == pytest.approx(
        3 / (3 * seconds(1, chain(8)))
    )


def test_requests_run_side_by_side():
    rate = replay.serve([[0] * 4] * 3, 2, seconds, width=1)
    assert rate == pytest.approx(12 / (4 * seconds(2, chain(1)) + 4 * seconds(1, chain(1))))


def test_the_policy_comes_near_the_best_width():
    config = AdaptiveConfig.for_block_size(8, proposers=["chain"])
    table = CostTable(config.arms, [StepTime(1, a, seconds(1, a)) for a in config.arms])
    traces = [[min(7, 59 - i) for i in range(60)]] * 30
    best = replay.serve(traces, 1, seconds, width=8)
    assert replay.serve(traces, 1, seconds, policy=ArmPolicy(config, table)) > 0.97 * best
