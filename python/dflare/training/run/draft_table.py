"""What a drafter proposes at every position of answers that are known, and walks over it.

What the target says does not depend on how it was drafted. So one pass drafts at every position at
which a decoder could be, and any way of verifying is a walk over that table: every width of a chain
and every budget of a tree, without decoding again, and on the same answers for two drafters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dflare.adaptive import Comparison
from dflare.ops import build_draft_tree, walk_draft_tree
from dflare.training.data.target import Target
from dflare.training.drafter.model import Drafter
from dflare.training.run.look_ups import LookUps
from dflare.training.run.step import draft_blocks

_CANDIDATES = 32  # tokens a slot that a tree may hold
_CHUNK = 256  # slots whose logits exist at once
_NEVER = 2**30  # rank of a token that is not there

# Tokens, log-probabilities and lengths as `build_draft_tree` takes them, an anchor a row.
Branches = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Nodes(NamedTuple):
    """Drafted nodes of trees, best first: those of a smaller tree are the first of a larger one.

    Attributes:
        chance: ``[L-1, n]`` float32, probability of each by whoever has proposed it.
        right: ``[L-1, n]`` bool, whether the answer goes by way of it.
    """

    chance: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class DraftTable:
    """Drafts of one answer; anchor i is the answer's token i.

    Args:
        answer: ``[L]`` int64.
        tokens: ``[L-1, B-1, K]`` int64, the most probable tokens of each slot, best first.
        log_probs: ``[L-1, B-1, K]`` float32, theirs.
        ranks: ``[L-1, B-1]`` int64, how many tokens are before the answer's own in its slot; beyond
            the end of the answer more than any.
    """

    answer: np.ndarray
    tokens: np.ndarray
    log_probs: np.ndarray
    ranks: np.ndarray

    def chain(self, width: int) -> list[int]:
        """Tokens that each verify step adds if blocks are cut to ``width``, anchor included."""
        right = np.logical_and.accumulate(self.ranks[:, : width - 1] == 0, axis=1)
        return self._walk(right.sum(1))

    def compare(self, looked_up: LookUps) -> Comparison:
        """Hold the drafter's chains against look-ups, anchor by anchor."""
        drafts = self.tokens[:, :, 0]
        same = drafts == looked_up.found.numpy()[:, : drafts.shape[1]]
        agreed, drafted = (
            np.logical_and.accumulate(true, axis=1).sum(1) for true in (same, self.ranks == 0)
        )
        return Comparison(looked_up.match.numpy(), looked_up.right, agreed, drafted)

    def spliced(self, width: int, seen: Comparison, least_strength: int) -> list[int]:
        """As :meth:`chain`, with look-ups in place of drafts where they are as well founded."""
        accepted = np.where(seen.strength() >= least_strength, seen.right, seen.drafted)
        return self._walk(np.minimum(accepted, width - 1))

    def tree(
        self, budgets: Sequence[int], branches: Branches | None = None
    ) -> dict[int, list[int]]:
        """The same for trees of so many verified tokens, the anchor and the best drafted nodes."""
        right = self.grow(max(budgets) - 1, branches).right
        return {budget: self._walk(right[:, : budget - 1].sum(1)) for budget in budgets}

    def grow(self, nodes: int, branches: Branches | None = None) -> Nodes:
        """Grow a tree at each anchor (DDTree, arXiv 2604.12989).

        Args:
            nodes: Drafted ones, n, at most K.
            branches: What a look-up proposes at each anchor, merged into the trees.
        """
        anchors = torch.from_numpy(self.answer[:-1])
        drafts = torch.from_numpy(self.tokens), torch.from_numpy(self.log_probs)
        log_probs = torch.empty(len(anchors), nodes + 1)
        tokens, parents, depths = build_draft_tree(
            anchors, *drafts, nodes, *(branches or ()), scores=log_probs
        )
        # Behind a node on the right path the target says the answer's token of its depth.
        after = torch.arange(len(anchors))[:, None] + 1 + depths
        ended = after >= len(self.answer)
        said = torch.from_numpy(self.answer)[after.clamp(max=len(self.answer) - 1)]
        said = said.masked_fill(ended, -1)
        path, _, _ = walk_draft_tree(tokens, parents, said, int(depths.max()) + 1)
        right = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, path.long(), True)
        return Nodes(log_probs[:, 1:].exp().numpy(), right[:, 1:].numpy())

    def _walk(self, accepted: Sequence[int] | np.ndarray) -> list[int]:
        """Go through the answer; ``accepted[i]`` drafts are right behind anchor i."""
        emitted, at = [], 0
        while at < len(self.answer) - 1:
            step = min(int(accepted[at]) + 1, len(self.answer) - 1 - at)
            emitted.append(step)
            at += step
        return emitted


@torch.no_grad()
def draft_table(
    target: Target, drafter: Drafter, prompt: list[int], answer: list[int]
) -> DraftTable:
    """Draft at every position of an answer.

    Args:
        target: Tapped as the drafter wants.
        drafter: On the same device.
        prompt: Token ids.
        answer: What the target says to it, at least two tokens.
    """
    slots = drafter.config.block_size - 1
    device = target.device
    ids = torch.tensor([prompt + answer], device=device)
    anchors = torch.arange(len(prompt), ids.shape[1] - 1, device=device)[None]
    taps = target.read(ids).taps
    hidden = draft_blocks(drafter, drafter.config, target, ids, anchors, taps)[0, :, 1:]
    padded = torch.cat([ids[0], ids.new_full((slots,), -1)])
    truth = padded[anchors[0, :, None] + torch.arange(1, slots + 1, device=device)]
    parts = []
    for states, wanted in zip(
        hidden.flatten(0, 1).split(_CHUNK), truth.flatten().split(_CHUNK), strict=True
    ):
        logits = drafter.logits(states, target.head).float()
        best = logits.topk(min(_CANDIDATES, logits.shape[-1]), -1)
        own = logits.gather(-1, wanted.clamp(min=0)[:, None])
        # Of equal logits the first counts as the better one, as for argmax.
        before = (logits > own) | (
            (logits == own) & (torch.arange(logits.shape[-1], device=device) < wanted[:, None])
        )
        rank = before.sum(-1).masked_fill(wanted < 0, _NEVER)
        parts.append((best.indices, best.values - logits.logsumexp(-1, keepdim=True), rank))
    tokens, log_probs, ranks = (
        torch.cat(part).unflatten(0, (-1, slots)).cpu().numpy() for part in zip(*parts, strict=True)
    )
    return DraftTable(np.array(answer), tokens, log_probs, ranks)
