"""Tensor-parallel ranks take the same widths, and talk about decisions only."""

import random
from types import SimpleNamespace

import pytest
import torch

from dflare.adaptive import AdaptiveConfig, CostTable, StepTime, WidthPolicy
from dflare.engine.widths import Agreement

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


def test_the_same_widths_with_a_word_a_decision(monkeypatch):
    wire = Wire(monkeypatch)
    config = AdaptiveConfig.for_block_size(8)
    times = [StepTime(n, w, 0.01 + 0.001 * w) for n in (1, 4) for w in config.widths]
    policy = WidthPolicy(config, CostTable(config.widths, times))
    leader, other = (Agreement(group) for group in wire.ranks)
    draw = random.Random(0)
    widths, steps = [], 400
    for start in range(0, steps, 100):
        requests = [f"r{start}-{i}" for i in range(draw.randrange(1, 4))]
        for step in range(100):
            # In the end fewer tokens are left than the block has.
            left = [100 - step - draw.randrange(2) for _ in requests]
            decision = policy.choose(requests, [max(n, 1) for n in left])
            ours = leader.settle(requests, left, (decision.width, policy.standing))
            assert ours == decision.width
            assert other.settle(requests, left, (0, 0)) == ours
            policy.observe(decision, [draw.randrange(1, ours + 1) for _ in requests], 0.02)
            widths.append(ours)
    assert len(set(widths)) > 2, "the policy did not change its mind"
    assert len(wire.said) < steps / 3, f"{len(wire.said)} words for {steps} steps"


def test_one_rank_alone_says_nothing():
    group = SimpleNamespace(world_size=1, rank_in_group=0)
    assert Agreement(group).settle(["a"], [5], (4, 8)) == 4
