"""Tensor-parallel ranks take the same arms, and talk about decisions only."""

import random
from types import SimpleNamespace

import pytest
import torch

from dflare.adaptive import AdaptiveConfig, ArmPolicy, CostTable, LookupRule, StepTime, chain
from dflare.engine.arms import Agreement

pytestmark = pytest.mark.slow  # imports SGLang


class Wire:
    """A group of two ranks; the other one hears what rank 0 said, in order."""

    def __init__(self, monkeypatch):
        self.said: list[list[int]] = []
        monkeypatch.setattr(torch.distributed, "broadcast", self._broadcast)
        self.ranks = [
            SimpleNamespace(world_size=2, rank_in_group=rank, ranks=[0, 1], cpu_group=rank)
            for rank in (0, 1)
        ]
        self._heard = 0

    def _broadcast(self, words, src, group):
        if group == 0:
            self.said.append(words.tolist())
        else:
            words.copy_(torch.tensor(self.said[self._heard]))
            self._heard += 1


def test_the_same_arms_with_a_word_a_decision(monkeypatch):
    wire = Wire(monkeypatch)
    config = AdaptiveConfig.for_block_size(8)
    times = [StepTime(n, a, 0.01 + 0.001 * a.nodes) for n in (1, 4) for a in config.arms]
    policy = ArmPolicy(config, CostTable(config.arms, times))
    leader, other = (Agreement(group, config.arms) for group in wire.ranks)
    draw = random.Random(0)
    arms, steps = [], 800
    for start in range(0, steps, 100):
        requests = [f"r{start}-{i}" for i in range(draw.randrange(1, 4))]
        for step in range(100):
            # In the end fewer tokens are left than the block has.
            left = [100 - step - draw.randrange(2) for _ in requests]
            decision = policy.choose(requests, [max(n, 1) for n in left])
            choice = decision.arm, decision.rule, policy.standing
            ours = leader.settle(requests, left, choice)
            assert ours == choice[:2]
            assert other.settle(requests, left, None) == ours
            most = decision.arm.nodes
            policy.observe(decision, [draw.randrange(1, most + 1) for _ in requests], 0.02)
            arms.append(decision.arm)
    assert len(set(arms)) > 2, "the policy did not change its mind"
    assert len(wire.said) < steps / 3, f"{len(wire.said)} words for {steps} steps"


def test_one_rank_alone_says_nothing():
    rule = LookupRule(6, 250)
    group = SimpleNamespace(world_size=1, rank_in_group=0)
    assert Agreement(group).settle(["a"], [5], (chain(4), rule, 8)) == (chain(4), rule)
