"""The policy learns where look-ups pay, whatever is proposed, and uses them there only."""

import numpy as np
import pytest

from dflare.adaptive import (
    AdaptiveConfig,
    ArmPolicy,
    Comparison,
    CostTable,
    LookupRule,
    SpecMetrics,
    StepTime,
    chain,
)
from dflare.adaptive.arms import Arm
from dflare.adaptive.lookup import SpliceRule

BLOCK = 8


def seen(match=0, right=0, agreed=-1, drafted=0):
    return Comparison(*(np.atleast_1d(np.array(x)) for x in (match, right, agreed, drafted)))


def seconds(batch, arm):
    """A draft pass costs a third of a plain step, a verified token a twentieth."""
    return 0.02 * (1 + 0.05 * batch * (arm.nodes - 1) + (arm.proposer == "chain") / 3)


def make_policy(seconds=seconds, **settings):
    config = AdaptiveConfig.for_block_size(BLOCK, **{"proposers": ["chain", "lookup"]} | settings)
    times = [StepTime(n, a, seconds(n, a)) for n in (1, 4, 16) for a in config.arms]
    return ArmPolicy(config, CostTable(config.arms, times))


def serve(policy, steps, *, drafter, look_up, matches, batch=1, seed=0, costs=seconds):
    """Serve steps of a drafter and a look-up with these chances to be right at each position.

    Args:
        matches: share of the steps in which the look-up finds something.
    """
    rng = np.random.default_rng(seed)
    decisions = []
    for _ in range(steps):
        decision = policy.choose(range(batch), [10_000] * batch)
        nodes, proposer = decision.arm.nodes, decision.arm.proposer
        drafts, look_ups = (
            np.cumprod(rng.random((batch, BLOCK)) < chance, axis=1) for chance in (drafter, look_up)
        )
        match = np.where(rng.random(batch) < matches, 12, 0)
        look_ups *= (match > 0)[:, None]
        spliced = (proposer == "chain") & (match >= decision.rule.splice)
        hits = np.where(spliced[:, None], look_ups, drafts) if proposer == "chain" else look_ups
        commit = 1 + hits[:, : nodes - 1].sum(axis=1)
        within = np.arange(BLOCK) < commit[:, None]
        # Drafts and look-ups that are right are the same tokens.
        found, drafted = ((x & within).sum(axis=1) for x in (look_ups, drafts))
        agreed = np.minimum(found, drafted) if proposer == "chain" else np.full(batch, -1)
        shown = Comparison(match, found, agreed, drafted)
        policy.observe(decision, commit.tolist(), costs(batch, decision.arm), shown)
        decisions.append(decision)
    return decisions


def share(decisions, proposer):
    later = decisions[len(decisions) // 2 :]
    return sum(d.arm.proposer == proposer for d in later) / len(later)


def test_text_that_repeats_is_looked_up_without_a_draft_pass():
    decisions = serve(make_policy(), 300, drafter=0.5, look_up=0.95, matches=1.0)
    assert share(decisions, "lookup") > 0.9
    assert decisions[-1].arm.nodes >= 6


@pytest.mark.parametrize("look_up", [0.0, 0.3])
def test_useless_look_ups_are_left_alone(look_up):
    decisions = serve(make_policy(), 600, drafter=0.6, look_up=look_up, matches=0.3)
    assert share(decisions, "chain") > 0.95
    assert decisions[-1].rule.splice > 12


def test_look_ups_that_are_better_than_drafts_replace_them():
    """The text repeats now and then: the drafter is still needed."""
    runs = [
        serve(make_policy(), 600, drafter=0.6, look_up=0.95, matches=0.3, seed=seed)
        for seed in range(3)
    ]
    assert np.mean([share(decisions, "chain") for decisions in runs]) > 0.65
    assert all(decisions[-1].rule.splice <= 12 for decisions in runs)


def test_it_is_noticed_while_plain_steps_run_that_the_text_repeats():
    policy = make_policy()
    decisions = serve(policy, 600, drafter=0.02, look_up=0.0, matches=0.0)
    assert share(decisions, "plain") > 0.9
    decisions = serve(policy, 120, drafter=0.02, look_up=0.95, matches=1.0, seed=1)
    assert share(decisions, "lookup") > 0.9


def test_a_draft_that_is_overdue_waits_until_it_can_be_paid_for():
    """Long without a draft, with one that costs ten steps: nothing else is tried in its place."""

    def costs(batch, arm):
        return seconds(batch, arm) * (10 if arm.proposer == "chain" else 1)

    policy = make_policy(costs, memory=100)
    decisions = serve(policy, 600, drafter=0.1, look_up=0.95, matches=1.0, costs=costs)
    assert share(decisions, "lookup") > 0.95


def test_without_the_proposer_there_is_no_such_arm_and_nothing_is_replaced():
    policy = make_policy(proposers=["chain"])
    assert {arm.proposer for arm in policy.arms} == {"plain", "chain"}
    assert policy.choose([0], [100]).rule == LookupRule()
    policy = make_policy(proposers=["lookup"])
    decisions = serve(policy, 100, drafter=0.0, look_up=0.9, matches=1.0)
    assert {d.arm.proposer for d in decisions} <= {"plain", "lookup"}
    assert policy.accept_rates() == []


def test_a_class_of_matches_is_believed_as_far_as_it_has_won():
    rule = SpliceRule(memory=1000)
    for _ in range(30):
        rule.observe(seen(match=[4, 20], right=[0, 3], agreed=[0, 0], drafted=[1, 0]), drafts=5)
    assert 4 < rule.least_strength() <= 17
    for _ in range(100):
        rule.observe(seen(match=[4, 20], right=[2, 0], agreed=[0, 0], drafted=[0, 1]), drafts=5)
    assert rule.least_strength() == 3 or rule.least_strength() == 4


def test_what_was_not_in_question_teaches_nothing():
    rule = SpliceRule(memory=10)
    before = rule.least_strength()
    for _ in range(100):
        rule.observe(seen(), drafts=5)  # no match
        rule.observe(seen(match=9, right=3), drafts=5)  # nothing drafted
        rule.observe(seen(match=9, right=6, agreed=5, drafted=5), drafts=5)  # the same tokens
        rule.observe(seen(match=9, right=1, agreed=2, drafted=1), drafts=5)  # rejected before
    assert rule.least_strength() == before


def test_what_the_drafter_found_too_makes_a_look_up_stronger():
    assert seen(match=[5, 5, 0], agreed=[2, -1, 0]).strength().tolist() == [7, 5, 0]


def test_accepted_tokens_are_counted_by_proposer():
    metrics = SpecMetrics(None)
    metrics.record(Arm("lookup", 4), [3, 1])
    metrics.record(chain(4), [2])
    spliced = seen(match=[9, 2, 9], right=[3, 0, 1], agreed=[1, 0, 2], drafted=[1, 2, 1])
    metrics.record(chain(4), [4, 3, 2], spliced, rule=LookupRule(5))
    assert metrics._by_proposer == {"lookup": 2 + 2, "chain": 1 + 1 + 2 + 1}
