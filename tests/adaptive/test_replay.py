"""The replay of a drafter's real acceptance: what it serves, and its record against decoding."""

import numpy as np
import pytest
from bench.policy import replay

from dflare.adaptive import NEVER, PLAIN, AdaptiveConfig, Arm, Comparison, chain
from dflare.training.run.draft_table import Nodes


def seconds(batch, arm):
    return 0.01 + 0.001 * batch * arm.nodes


def trace(drafted, trees=None, chances=None, match=None, right=None):
    """Of the drafter's right tokens behind each anchor, and what else is given."""
    none = np.zeros(len(drafted), dtype=np.int64)
    found = none if match is None else np.array(match), none if right is None else np.array(right)
    nodes = np.array(trees or [[0]] * len(drafted), dtype=bool)
    grown = Nodes(np.array(chances or np.zeros(nodes.shape)), nodes)
    chance = np.zeros((len(drafted), 11), dtype=np.float32)
    return replay.Trace(Comparison(*found, none, np.array(drafted)), grown, grown, chance)


def rate(traces, arm, concurrency=1, splice=NEVER):
    return replay.serve(traces, concurrency, seconds, replay.Fixed(arm, splice))


def test_a_width_commits_what_was_accepted_and_no_more_than_the_answer():
    traces = [trace([7, 6, 5, 4, 3, 2, 1, 0])]
    assert rate(traces, chain(8)) == pytest.approx(8 / seconds(1, chain(8)))
    # Of 4 tokens at a time.
    assert rate(traces, chain(4)) == pytest.approx(8 / (2 * seconds(1, chain(4))))
    assert rate([trace([0, 0, 0])], chain(8)) == pytest.approx(3 / (3 * seconds(1, chain(8))))


def test_requests_run_side_by_side():
    found = rate([trace([0] * 4)] * 3, PLAIN, concurrency=2)
    assert found == pytest.approx(12 / (4 * seconds(2, PLAIN) + 4 * seconds(1, PLAIN)))


def test_look_ups_and_trees_commit_what_is_right_in_them():
    traces = [
        trace([0] * 4, [[0, 1], [0, 0], [1, 0], [0, 0]], match=[5, 0, 0, 0], right=[3, 0, 0, 0])
    ]
    assert rate(traces, Arm("tree", 3)) == pytest.approx(4 / (2 * seconds(1, Arm("tree", 3))))
    assert rate(traces, Arm("lookup", 4)) == pytest.approx(4 / seconds(1, Arm("lookup", 4)))
    assert rate(traces, chain(4), splice=5) == pytest.approx(4 / seconds(1, chain(4)))
    assert rate(traces, chain(4), splice=6) == pytest.approx(4 / (4 * seconds(1, chain(4))))


def test_a_cost_aware_budget_takes_what_the_drafter_hopes_over_what_it_costs():
    chances = [[0.5, *[0.2] * 5, 0], [0.1, *[0.04] * 5, 0]]
    request = replay._Request(0, trace([0, 0], chances=chances))
    chooser = replay.CostAware((2, 8), seconds)
    assert chooser.choose([request]) == (Arm("tree", 8), NEVER)  # 2.5 / 18 ms, 1.5 / 12 ms
    request.at = 1
    assert chooser.choose([request]) == (Arm("tree", 2), NEVER)


@pytest.mark.parametrize("proposers", [["chain"], ["chain", "lookup", "tree"]])
def test_the_policy_comes_near_the_best_arm(proposers):
    config = AdaptiveConfig.for_block_size(8, proposers=proposers)
    drafted = [min(7, 59 - i) for i in range(60)]
    trees = [[i < 59, i < 58, *[False] * 13] for i in range(60)]
    traces = [trace(drafted, trees)] * 30
    best = rate(traces, chain(8))
    policy = replay.Policy(config, seconds, 1, seed=0)
    assert replay.serve(traces, 1, seconds, policy) > (0.97 if len(proposers) == 1 else 0.93) * best
