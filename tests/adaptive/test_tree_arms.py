"""The policy verifies trees where verified tokens are cheap, and learns what look-ups are worth."""

import numpy as np
import pytest
import torch

from dflare.adaptive import AdaptiveConfig, Arm, ArmPolicy, CostTable, StepTime
from dflare.branch import BranchOdds

BLOCK = 6


def accepted(rng, arm, bs, chance=0.45):
    """Tokens that a step commits: a second child of a node is right half as often as the first."""
    if arm.proposer == "tree":
        # Nodes go to the first depths: the more there are, the more children each node has.
        deeper = [
            min(0.9, chance * (1 + 0.5 * min(1, arm.nodes / (6 * d)))) for d in range(1, BLOCK)
        ]
    else:
        deeper = [chance] * (arm.nodes - 1)
    return 1 + np.cumprod(rng.random((bs, len(deeper))) < deeper, axis=1).sum(1)


def serve(token_cost, batch, steps=800):
    """Arms of the later half; a draft pass costs a fifth of a plain step."""

    def seconds(n, arm):
        drafts = arm.proposer in ("chain", "tree")
        return 0.02 * (1 + token_cost * n * (arm.nodes - 1) + 0.2 * drafts)

    config = AdaptiveConfig.for_block_size(BLOCK, proposers=["chain", "tree"])
    times = [StepTime(n, arm, seconds(n, arm)) for n in (1, 4, 16) for arm in config.arms]
    policy, rng = ArmPolicy(config, CostTable(config.arms, times)), np.random.default_rng(0)
    arms = []
    for _ in range(steps):
        decision = policy.choose(range(batch), [10_000] * batch)
        commit = accepted(rng, decision.arm, batch)
        policy.observe(decision, commit.tolist(), seconds(batch, decision.arm))
        arms.append(decision.arm)
    return arms[steps // 2 :]


def test_trees_are_verified_where_tokens_are_nearly_free():
    arms = serve(token_cost=0.005, batch=1)
    assert sum(arm.proposer == "tree" for arm in arms) > 0.8 * len(arms)


def test_trees_are_left_where_tokens_are_dear():
    arms = serve(token_cost=0.06, batch=16)
    assert sum(arm.proposer == "tree" for arm in arms) < 0.1 * len(arms)


def test_a_tree_is_no_wider_than_what_a_request_may_still_produce():
    config = AdaptiveConfig.for_block_size(BLOCK, proposers=["tree"])
    times = [StepTime(1, arm, 0.01) for arm in config.arms]
    policy = ArmPolicy(config, CostTable(config.arms, times))
    assert config.arms[1:] == tuple(Arm("tree", nodes) for nodes in (4, 6, 8, 12))
    assert all(policy.choose(["r"], [5]).arm.nodes <= 6 for _ in range(50))


@pytest.mark.parametrize("trees", [[1, 6], [6, 13]])
def test_trees_that_no_slots_are_reserved_for_are_refused(trees):
    with pytest.raises(ValueError, match=r"must verify 2 to 12 tokens"):
        AdaptiveConfig.for_block_size(BLOCK, trees=trees)


def test_odds_of_a_look_up_follow_what_was_right():
    """By the length of the match, and of what was right behind it."""
    rng, odds = np.random.default_rng(0), BranchOdds()
    match = torch.tensor([3, 12]).int()
    before = odds.log_probs(match, 4).exp().numpy()
    assert (np.diff(before) > 0).all() and (before[1] > before[0]).all()
    for _ in range(600):
        right = [int(rng.random() < 0.2), int(np.cumprod(rng.random(4) < 0.95).sum())]
        odds.observe(match, torch.tensor([1, 4]), torch.tensor(right), 4)
    after = odds.log_probs(match, 4).exp().numpy()
    assert after[0, 0] == pytest.approx(0.2, abs=0.06)
    assert after[1] == pytest.approx(0.95, abs=0.05)
    assert after[0, 1] == pytest.approx(before[0, 1], abs=0.01)  # a match of 4: never seen


def test_tokens_that_were_not_reached_teach_nothing():
    odds = BranchOdds()
    five, none = torch.tensor([5]).int(), torch.tensor([0])
    before = odds.log_probs(five, 6)
    odds.observe(five, none, none, 6)
    assert (odds.log_probs(five, 6) == before).all()
    every = torch.arange(20)
    untaught = odds.log_probs(every, 6)
    odds.observe(none, torch.tensor([6]), none, 6)  # there was no proposal
    assert odds.log_probs(every, 6).equal(untaught)
    odds.observe(five, torch.tensor([6]), torch.tensor([1]), 6)  # the second was wrong
    changed = odds.log_probs(five, 6) != before
    assert changed[0, :2].all() and not changed[0, 2:].any()


def test_odds_that_are_noted_are_learned_from_every_few_steps():
    """What sixteen steps taught one by one; batches and look-ups may differ in size."""
    together, alone, g = BranchOdds(), BranchOdds(), torch.Generator().manual_seed(0)
    three = torch.tensor([3])
    for step in range(16):
        assert together.log_probs(three, 1).equal(BranchOdds().log_probs(three, 1))
        bs, count = 1 + step % 3, 12 - step // 2
        match = torch.randint(3, 10, (bs,), generator=g).int()
        proposed, right = (torch.randint(0, count, (bs,), generator=g) for _ in range(2))
        together.note(match, proposed, right, count)
        alone.observe(match, proposed, right, count)
    match = torch.arange(3, 12)
    assert not together.log_probs(match, 9).equal(BranchOdds().log_probs(match, 9))
    torch.testing.assert_close(
        together.log_probs(match, 9), alone.log_probs(match, 9), rtol=0.02, atol=0.002
    )
