import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflare.adaptive import AdaptiveConfig, ArmPolicy, CostTable, StepTime, chain

BLOCK = 8


def make_policy(seconds, **settings):
    config = AdaptiveConfig.for_block_size(BLOCK, proposers=["chain"], **settings)
    batches = (1, 2, 4, 8, 16)
    measured = (StepTime(n, a, seconds(n, a.nodes)) for n in batches for a in config.arms)
    return ArmPolicy(config, CostTable(config.arms, measured))


def flat(batch, width):
    return 0.02


def sloped(slope):
    return lambda batch, width: 0.02 * (1 + slope * (width - 1))


def serve(policy, accept, seconds, steps, batch=1, seed=0, left=10_000, noise=0.05):
    """Serve `steps` steps of a drafter that is accepted with `accept`; return the decisions."""
    rng = np.random.default_rng(seed)
    decisions = []
    for _ in range(steps):
        decision = policy.choose(range(batch), [left] * batch)
        hits = rng.random((batch, BLOCK - 1)) < accept
        commit = 1 + np.cumprod(hits, axis=1)[:, : decision.arm.nodes - 1].sum(axis=1)
        took = seconds(batch, decision.arm.nodes) * rng.lognormal(0, noise)
        policy.observe(decision, commit.tolist(), took)
        decisions.append(decision)
    return decisions


def settled_width(decisions):
    """The width that most of the later half used."""
    widths = [d.arm.nodes for d in decisions[len(decisions) // 2 :]]
    return max(set(widths), key=widths.count)


def test_free_verification_takes_the_whole_block():
    policy = make_policy(flat)
    assert settled_width(serve(policy, 0.5, flat, 400, noise=0.0)) == BLOCK


def test_a_useless_drafter_is_switched_off():
    seconds = sloped(0.2)
    policy = make_policy(seconds)
    later = serve(policy, 0.02, seconds, 600)[300:]
    assert sum(d.arm.nodes > 1 for d in later) <= 15


@settings(deadline=None, max_examples=12)
@given(st.floats(0.05, 0.9), st.floats(0.02, 0.4), st.integers(0, 1000))
def test_the_settled_width_is_the_best_one_or_nearly_as_good(accept, slope, seed):
    seconds = sloped(slope)
    policy = make_policy(seconds)
    width = settled_width(serve(policy, accept, seconds, 800, batch=4, seed=seed))
    rate = {w: sum(accept**k for k in range(w)) / seconds(4, w) for w in policy.config.widths}
    assert rate[width] >= 0.95 * max(rate.values())


@settings(deadline=None, max_examples=25)
@given(st.floats(0.1, 0.6), st.floats(0.2, 0.4), st.floats(0.0, 0.3), st.integers(0, 1000))
def test_a_better_drafter_never_gets_a_narrower_width(accept, gain, slope, seed):
    def first_choice(probability):
        policy = make_policy(sloped(slope), explore=0.0, patience=0.0)
        rng = np.random.default_rng(seed)
        for _ in range(100):
            hits = rng.random((1, BLOCK - 1)) < probability
            policy.observe(policy.choose([0], [1000]), 1 + np.cumprod(hits, axis=1).sum(axis=1))
        return policy.choose([0], [1000]).arm.nodes

    assert first_choice(accept + gain) >= first_choice(accept)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=6), min_size=1, max_size=40),
    st.floats(0.0, 0.5),
    st.integers(0, 1000),
)
def test_widths_are_configured_ones_and_reach_no_further_than_needed(batches, slope, seed):
    seconds = sloped(slope)
    policy = make_policy(seconds, explore=0.2)
    rng = np.random.default_rng(seed)
    for remaining in batches:
        decision = policy.choose(range(len(remaining)), remaining)
        narrower = [w for w in policy.config.widths if w < decision.arm.nodes]
        assert decision.arm.nodes in policy.config.widths
        assert all(w < max(remaining) for w in narrower)
        commit = rng.integers(1, decision.arm.nodes + 1, len(remaining))
        policy.observe(decision, commit.tolist(), seconds(1, decision.arm.nodes))


def test_a_decision_stands_for_eight_steps_of_the_same_requests():
    policy = make_policy(flat, explore=0.0)
    decisions = [policy.choose([0], [1000]) for _ in range(9)]
    assert [decision is decisions[0] for decision in decisions] == [True] * 8 + [False]
    assert policy.choose([0, 1], [1000, 1000]) is not decisions[-1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("plain", [0.4, 1.0, 2.5])
def test_a_new_server_finds_out_what_start_up_has_measured_wrong(plain, seed):
    seconds = sloped(0.1)
    policy = make_policy(lambda n, w: seconds(n, w) * (plain if w == 1 else 1))
    width = settled_width(serve(policy, 0.6, seconds, 300, seed=seed, noise=0.03))
    rate = {w: sum(0.6**k for k in range(w)) / seconds(1, w) for w in policy.config.widths}
    assert rate[width] >= 0.95 * max(rate.values())


def test_the_same_inputs_give_the_same_decisions():
    seconds = sloped(0.1)
    runs = [serve(make_policy(seconds), 0.6, seconds, 300, batch=3) for _ in range(2)]
    assert runs[0] == runs[1]


@settings(deadline=None, max_examples=10)
@given(st.floats(0.05, 0.95), st.floats(0.0, 0.3), st.sampled_from([1, 8]), st.integers(0, 1000))
def test_stationary_noise_causes_no_oscillation(accept, slope, batch, seed):
    seconds = sloped(slope)
    policy = make_policy(seconds)
    settled = serve(policy, accept, seconds, 1500, batch=batch, seed=seed)[500:]
    widths = [d.arm.nodes for d in settled if not d.exploring]
    assert sum(a != b for a, b in itertools.pairwise(widths)) <= 40


@settings(deadline=None, max_examples=8)
@given(st.floats(0.02, 0.6), st.floats(0.1, 1.0), st.sampled_from([1, 4]), st.integers(0, 1000))
def test_exploring_costs_little_more_than_two_percent(accept, slope, batch, seed):
    seconds = sloped(slope)
    policy = make_policy(seconds)
    decisions = serve(policy, accept, seconds, 2000, batch=batch, seed=seed)
    best = max(sum(accept**k for k in range(w)) / seconds(1, w) for w in policy.config.widths)
    spent = sum(seconds(1, d.arm.nodes) for d in decisions)
    lost = sum(
        seconds(1, d.arm.nodes) - sum(accept**k for k in range(d.arm.nodes)) / best
        for d in decisions
        if d.exploring
    )
    assert lost <= 0.025 * spent


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("slope", [0.05, 0.2])
@pytest.mark.parametrize("accept", [0.0, 0.05])
def test_recovered_acceptance_is_noticed_within_a_memory(batch, slope, accept):
    seconds = sloped(slope)
    policy = make_policy(seconds)
    serve(policy, accept, seconds, 2000, batch=batch)
    assert settled_width(serve(policy, 0.95, seconds, policy.config.memory, batch, seed=1)) >= 6


@pytest.mark.parametrize("seed", range(4))
def test_drafts_that_were_dear_for_a_while_are_tried_again(seed):
    seconds = sloped(0.1)
    policy = make_policy(seconds)
    for width in policy.config.widths * 100:
        policy.cost.observe(1, chain(width), [seconds(1, width) * (1.6 if width > 1 else 1)])
    assert settled_width(serve(policy, 0.5, seconds, 40, seed=seed)) == 1
    later = serve(policy, 0.5, seconds, 3000, seed=seed)[2000:]
    assert sum(d.arm.nodes > 1 for d in later) > 0.9 * len(later)


def test_without_exploration_nothing_but_the_estimate_decides():
    seconds = sloped(0.2)
    policy = make_policy(seconds, explore=0.0)
    assert not any(d.exploring for d in serve(policy, 0.1, seconds, 300))


def test_a_load_that_makes_width_costly_narrows_it_at_once():
    def crowded(batch, width):
        return 0.02 if batch < 4 else 0.005 * batch * width

    policy = make_policy(crowded, explore=0.0)
    assert settled_width(serve(policy, 0.6, crowded, 60)) == BLOCK
    assert serve(policy, 0.6, crowded, 2, batch=16)[-1].arm.nodes == 1
