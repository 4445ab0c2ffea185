"""Nodes go to whoever's drafts are most probable, as many as are wanted in the mean."""

import numpy as np
import pytest

from dflare.adaptive import (
    AdaptiveConfig,
    Arm,
    ArmPolicy,
    Comparison,
    CostTable,
    NodePrices,
    StepTime,
)


def nodes(rng, bs):
    """Log-probabilities of 11 nodes a request, falling; requests differ in how fast."""
    speed = rng.choice([0.1, 0.5, 1.5], size=(bs, 1))
    return np.cumsum(-speed * rng.exponential(size=(bs, 11)), axis=1)


@pytest.mark.parametrize("bs", [1, 16])
@pytest.mark.parametrize("wanted", [1, 3, 7])
def test_as_many_nodes_as_wanted_in_the_mean_and_the_best_of_them(bs, wanted):
    rng, prices = np.random.default_rng(0), NodePrices()
    every, chosen = [], []
    for step in range(600):
        log_probs = nodes(rng, bs)
        prices.observe(log_probs)
        if step >= 100:
            every.append(log_probs)
            chosen.append(log_probs >= prices.least(wanted))
    counts = np.stack(chosen).sum(2)
    assert counts.mean() == pytest.approx(wanted, rel=0.1)
    assert counts.std() > 0.3, "all requests got the same"
    best = np.sort(np.exp(every), axis=None)[::-1][: counts.sum()]
    assert np.exp(every)[np.stack(chosen)].sum() > 0.98 * best.sum()


def test_nothing_is_worth_verifying_that_is_as_good_as_impossible():
    prices = NodePrices()
    log_probs = np.array([[-0.1, -0.2, -7.0, -np.inf]])
    prices.observe(log_probs)
    assert (log_probs >= prices.least(4)).sum() == 2
    assert NodePrices().least(3) < -5, "nothing was seen: whatever is there is taken"


def test_a_follower_of_other_workloads_forgets_the_old_one():
    prices = NodePrices()
    for log_prob, steps in ((-0.1, 2000), (-3.0, 600)):
        for _ in range(steps):
            prices.observe(np.full((1, 11), log_prob))
    assert -3.2 < prices.least(5) < -2.9


def serve(config, batch, steps, matching):
    """A look-up is right where it finds something; only those requests' tokens are verified."""

    def seconds(n, arm, tokens=None):
        return 0.02 + 0.001 * (n * arm.nodes if tokens is None else tokens)

    times = [StepTime(n, arm, seconds(n, arm)) for n in (1, 4, 16) for arm in config.arms]
    policy, rng = ArmPolicy(config, CostTable(config.arms, times)), np.random.default_rng(0)
    arms, predicted, took = [], [], []
    for _ in range(steps):
        decision = policy.choose(range(batch), [10_000] * batch)
        arm = decision.arm
        match = np.where(rng.random(batch) < matching, 12, 0)
        right = np.where(match > 0, rng.geometric(0.3, batch), 0)
        counts = np.full(batch, arm.nodes)
        if config.ragged:  # what pays: token k is right in 0.7^(k - 1) of the cases
            pays = int((0.7 ** np.arange(11) >= decision.rule.odds / 1000).sum())
            worth = np.where(match > 0, pays, 0)
            counts = 1 + np.minimum(worth, arm.nodes - 1)
        commits = 1 + np.minimum(right, counts - 1)
        none = np.zeros(batch, dtype=int)
        seen = Comparison(match, np.minimum(right, commits), none - 1, none)
        if config.ragged:
            seen = seen._replace(worth=worth)
        took.append(seconds(batch, arm, int(counts.sum())))
        predicted.append(decision.predicted_seconds)
        policy.observe(decision, commits.tolist(), took[-1], seen, int(counts.sum()))
        arms.append(arm)
    return arms[steps // 2 :], np.sum(predicted[steps // 2 :]) / np.sum(took[steps // 2 :])


def test_look_ups_pay_under_load_where_only_what_is_worth_its_time_is_verified():
    config = AdaptiveConfig.for_block_size(6, proposers=["lookup"])
    shared = config.sharing(6, 12)
    assert config.arms[1:] == tuple(Arm("lookup", n) for n in (2, 3, 4, 6))
    assert shared.arms[1:] == tuple(Arm("lookup", n) for n in (2, 3, 4, 6, 8, 12))
    uniform, _ = serve(config, 16, 600, matching=0.1)
    ragged, error = serve(shared, 16, 600, matching=0.1)
    assert sum(arm.proposer == "lookup" for arm in uniform) < 0.1 * len(uniform)
    assert sum(arm.proposer == "lookup" for arm in ragged) > 0.9 * len(ragged)
    assert error == pytest.approx(1.0, abs=0.05)


def test_sharing_offers_small_trees_too_and_no_more_than_slots_are_reserved_for():
    config = AdaptiveConfig.for_block_size(6)
    assert config.sharing(6, 12).trees == (2, 3, 4, 6, 8, 12)
    assert config.sharing(6, 6).trees == (2, 3, 4, 6)
    assert config.sharing(6, 6).lookups == (2, 3, 4, 6)
    assert config.sharing(6, 12).most(Arm("tree", 3)) == 12
    assert config.most(Arm("tree", 3)) == 3
    chosen = AdaptiveConfig.for_block_size(6, trees=[5]).sharing(6, 12)
    assert chosen.trees == (5,)
