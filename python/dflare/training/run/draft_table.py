"""What a drafter proposes at every position of answers that are known, and walks over it.

What the target says does not depend on how it was drafted. So one pass drafts at every position at
which a decoder could be, and any way of verifying is a walk over that table: every width of a chain
and every budget of a tree, without decoding again, and on the same answers for two drafters.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dflare.training.data.target import Target
from dflare.training.drafter.model import Drafter
from dflare.training.run.step import draft_blocks

_CANDIDATES = 32  # tokens a slot that a tree may hold
_CHUNK = 256  # slots whose logits exist at once
_NEVER = 2**30  # rank of a token that is not there


@dataclass(frozen=True)
class DraftTable:
    """Drafts of one answer; anchor i is the answer's token i.

    Args:
        length: Tokens of the answer, L.
        tokens: ``[L-1, B-1, K]`` int64, the most probable tokens of each slot, best first.
        log_probs: ``[L-1, B-1, K]`` float32, theirs.
        ranks: ``[L-1, B-1]`` int64, how many tokens are before the answer's own in its slot; beyond
            the end of the answer more than any.
    """

    length: int
    tokens: np.ndarray
    log_probs: np.ndarray
    ranks: np.ndarray

    def chain(self, width: int) -> list[int]:
        """Tokens that each verify step adds if blocks are cut to ``width``, anchor included."""
        right = np.logical_and.accumulate(self.ranks[:, : width - 1] == 0, axis=1)
        return self._walk(right.sum(1))

    def tree(self, budgets: Sequence[int]) -> dict[int, list[int]]:
        """The same for trees of the best so many drafted nodes (DDTree, arXiv 2604.12989)."""
        places = [
            _places(rows, ranks, max(budgets))
            for rows, ranks in zip(self.log_probs.tolist(), self.ranks.tolist(), strict=True)
        ]
        return {
            budget: self._walk([sum(place < budget for place in own) for own in places])
            for budget in budgets
        }

    def _walk(self, accepted: Sequence[int] | np.ndarray) -> list[int]:
        """Go through the answer; ``accepted[i]`` drafts are right behind anchor i."""
        emitted, at = [], 0
        while at < self.length - 1:
            step = min(int(accepted[at]) + 1, self.length - 1 - at)
            emitted.append(step)
            at += step
        return emitted


def _places(rows: list[list[float]], ranks: list[int], limit: int) -> list[int]:
    """Find the answer's own nodes in a tree that grows best first.

    A node is a token behind its parent; its score is the product of the slots' probabilities. The
    next best node is always the sibling or the first child of one that is there.

    Args:
        rows: ``[B-1][K]`` log-probabilities, best first.
        ranks: Which of each row is the answer's own token.
        limit: Nodes to look at.

    Returns:
        For the answer's tokens, from the first on, at which place its node comes; those within the
        limit.
    """
    heap = [(-rows[0][0], 0, 0, 0.0, True)]  # minus score, depth, rank, parent's score, own path
    places = []
    for place in range(limit):
        if not heap:
            break
        cost, depth, rank, before, on_path = heapq.heappop(heap)
        own = on_path and ranks[depth] == rank
        if own:
            places.append(place)
        if rank + 1 < len(rows[depth]):
            cost_of_sibling = -(before + rows[depth][rank + 1])
            heapq.heappush(heap, (cost_of_sibling, depth, rank + 1, before, on_path))
        if depth + 1 < len(rows):
            heapq.heappush(heap, (cost - rows[depth + 1][0], depth + 1, 0, -cost, own))
    return places


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
    return DraftTable(len(answer), tokens, log_probs, ranks)
