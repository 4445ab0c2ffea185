"""What thinking takes of a decode step: `python -m bench.policy.overhead`.

The policy, once it has tried its arms, and what a tree step does besides both models: look up,
build, share out, cut, walk, learn. A mean, because a decision stands for several steps: most of
them take next to nothing. With warm caches, and as in a server: between two parts of a step a
model's weights have passed through them.
"""

import time
from collections.abc import Callable
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dflare.adaptive import LEAST_MATCH, AdaptiveConfig, ArmPolicy, CostTable, StepTime
from dflare.engine.lookups import Proposal
from dflare.engine.tree_proposal import TreeProposals
from dflare.ops import lookup_continuations, walk_draft_tree

_BLOCK = 6
_NODES = 4  # of a request in the mean
_TRIED = 400  # steps after which a policy has tried every arm
_CONTEXT = 1024  # tokens that look-ups search
_WEIGHTS = np.zeros(8_000_000)  # 64 MB, more than a last-level cache


def measure(batch: int, cold: bool, steps: int = 400) -> dict[str, float]:
    """Mean milliseconds of one core, a step of each part; requests share their nodes."""
    config = AdaptiveConfig.for_block_size(_BLOCK).sharing(_BLOCK, 2 * _BLOCK)
    measured = [
        StepTime(n, a, 5e-3 + 1e-4 * n * a.nodes)
        for n in (1, 2, 4, 8, 16, 32, 64)
        for a in config.arms
    ]
    policy = ArmPolicy(config, CostTable(config.arms, measured))
    requests, remaining = [f"request {i}" for i in range(batch)], [100] * batch
    rng, tree = np.random.default_rng(0), _TreeStep(batch)
    spent: dict[str, list[float]] = {name: [] for name in ("choose", "tree", "learn", "observe")}

    def timed(name: str, part: Callable[[], Any]) -> Any:
        if cold and len(spent[name]) >= _TRIED:
            np.add(_WEIGHTS, 1, out=_WEIGHTS)
        start = time.thread_time()
        result = part()
        spent[name].append(time.thread_time() - start)
        return result

    for _ in range(_TRIED + steps):
        decision = timed("choose", lambda: policy.choose(requests, remaining))
        timed("tree", tree.propose)
        timed("learn", tree.learn)
        commit = np.minimum(config.most(decision.arm), rng.geometric(0.4, batch)).tolist()
        took = decision.predicted_seconds
        timed("observe", lambda d=decision, c=commit, s=took: policy.observe(d, c, s))
    return {name: 1e3 * mean(seconds[_TRIED:]) for name, seconds in spent.items()}


class _TreeStep:
    """The parts of a tree step that are ours to think, on drafts at random."""

    def __init__(self, batch: int) -> None:
        shape, most = (batch, _BLOCK - 1, 2 * _BLOCK - 1), 2 * _BLOCK - 1
        logits = 3 * torch.randn(*shape[:2], 1000)
        best = logits.log_softmax(-1).topk(most)
        self._drafts, self._most = (best.indices, best.values), most + 1
        self._proposals = TreeProposals(SimpleNamespace(device="cpu"), ragged=True, longest=most)
        self._text = torch.randint(0, 50, (batch * _CONTEXT,)).int()
        self._table = torch.arange(batch * _CONTEXT).int().view(batch, _CONTEXT)
        self._row = torch.arange(batch)
        self._lens = torch.full((batch,), _CONTEXT - 1)
        self._anchors = torch.zeros(batch, dtype=torch.long)

    def propose(self) -> None:
        """Look up, merge, build, share out and cut; walk what is left."""
        text = self._text, self._table, self._row, self._lens, self._anchors
        found, match = lookup_continuations(*text, self._most, least_match=LEAST_MATCH)
        self._look_up = Proposal(found, match, self._anchors, found)
        self._proposals.weigh(self._look_up, 200)
        most = self._most
        tree = self._proposals.merge(self._anchors, self._drafts, self._look_up, _NODES, most)
        said = torch.zeros_like(tree.tokens)
        _, self._commit_lens, _ = walk_draft_tree(tree.tokens, tree.parents, said, most)

    def learn(self) -> None:
        """Learn what look-ups are worth."""
        self._proposals.learn(self._look_up, self._commit_lens - 1, self._commit_lens)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("batch  caches  choose  tree  learn  observe  all, ms")
    for batch in (1, 8, 16, 64):
        for cold in (False, True):
            parts = measure(batch, cold)
            words = "  ".join(f"{value:.3f}" for value in parts.values())
            caches = "cold" if cold else "warm"
            print(f"{batch:5}  {caches:>6}  {words}  {sum(parts.values()):.3f}", flush=True)
