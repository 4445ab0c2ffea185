"""What a step that verifies a tree a request is made of, and how many nodes each request has.

Where attention takes requests with different numbers of queries, the nodes of a step are shared out
over its requests, the most probable first: a request whose drafts are doubtful leaves its nodes to
others, and of look-ups alone every token is verified that is worth its time, and no other.
Elsewhere every request has as many.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.speculative.spec_utils import GrammarTree

from dflare import ops
from dflare.adaptive import Arm, NodePrices
from dflare.branch import BranchOdds
from dflare.engine.lookups import Proposal
from dflare.engine.tree_draft import draft_marginals


@dataclass(frozen=True)
class DraftTree:
    """Trees of up to n drafted nodes, one a request; row 0 is the anchor.

    Rows that a request does not have stand behind those that it has, and on no way from the anchor.

    Attributes:
        tokens: [bs, n + 1] int64.
        parents: [bs, n + 1] int32, -1 for the anchor.
        depths: [bs, n + 1] int32.
        counts: [bs] int64, rows of each request; None if each has all.
        rows: [N] int64, those rows in the order of [bs * (n + 1)].
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    counts: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """n + 1."""
        return self.tokens.shape[1]

    @property
    def verified(self) -> int:
        """Rows of all requests."""
        return self.tokens.numel() if self.rows is None else len(self.rows)

    def cut(self, counts: torch.Tensor) -> "DraftTree":
        """Only the first so many rows of each request, [bs] int64, at least 1."""
        cut = ops.cut_draft_tree(self.tokens, self.parents, self.depths, counts)
        tokens, parents, depths, rows = cut
        if len(rows) == tokens.numel():
            return DraftTree(tokens, parents, depths)
        return DraftTree(tokens, parents, depths, counts, rows)

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """Values of all rows, [bs, n + 1], of those that are there, [N]."""
        return x.contiguous().flatten() if self.rows is None else x.flatten()[self.rows]

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Values [N, ...] back at their rows, [bs * (n + 1), ...], zeros elsewhere."""
        if self.rows is None:
            return x
        return x.new_zeros(self.tokens.numel(), *x.shape[1:]).index_copy_(0, self.rows, x)

    def starts(self) -> torch.Tensor:
        """Where each request's rows begin among those that are there, [bs] int64."""
        if self.counts is not None:
            return self.counts.cumsum(0) - self.counts
        return torch.arange(len(self.tokens), device=self.tokens.device) * self.width

    def for_grammar(self) -> GrammarTree:
        """As SGLang walks it: first child and next sibling of each node, -1 for none."""
        width = self.width
        row = torch.arange(width, device=self.tokens.device)
        is_child = self.parents[:, None] == row[:, None]  # [bs, parent, node]
        behind = (self.parents[:, None] == self.parents[:, :, None]) & (row > row[:, None])
        child, sibling = (
            first.where(first < width, -1)
            for first in (row.where(found, width).amin(-1) for found in (is_child, behind))
        )
        return GrammarTree.from_device(child, sibling, self.tokens)


class TreeProposals:
    """Merges what the drafter and look-ups propose, and shares out the nodes.

    What it learns depends on drafts and committed tokens, which are the same on all ranks.
    """

    def __init__(self, worker: Any, *, ragged: bool, longest: int = 0) -> None:
        """
        Args:
            worker: a `DFlareWorker`.
            ragged: whether requests may have different numbers of nodes.
            longest: tokens of a look-up.
        """
        self._worker, self._ragged, self._longest = worker, ragged, longest
        self._odds, self._prices = BranchOdds(worker.device), NodePrices()

    def make(self, batch: Any, arm: Arm, look_up: Proposal | None, most: int) -> DraftTree:
        """What a step of an arm verifies.

        Args:
            batch: SGLang's `ScheduleBatch` in decode mode, with the anchors in its `spec_info`.
            arm: its nodes are a mean if requests may differ.
            look_up: what the text so far proposes.
            most: rows that a request may have.
        """
        anchors = batch.spec_info.bonus_tokens.view(-1).long().contiguous()
        if arm.proposer == "lookup":
            assert look_up
            return _chains(anchors, look_up, min(arm.nodes, most))
        drafts = draft_marginals(self._worker, batch, most - 1)
        if not batch.reqs:  # start-up measures what it asks for
            most = min(arm.nodes, most)
        return self.merge(anchors, drafts, look_up, arm.nodes, most)

    def merge(
        self,
        anchors: torch.Tensor,
        drafts: tuple[torch.Tensor, torch.Tensor],
        look_up: Proposal | None,
        nodes: int,
        most: int,
    ) -> DraftTree:
        """The best of what the drafter and a look-up propose.

        Args:
            anchors: [bs] int64.
            drafts: tokens and log-probabilities [bs, D, K], as `ops.build_draft_tree` takes them.
            look_up: what the text so far proposes.
            nodes: rows of a request, in the mean if requests may differ.
            most: rows that a request may have.
        """
        branch: tuple[torch.Tensor, ...] = ()
        if look_up:
            branch = self._odds.branches(look_up.found, look_up.match)
        shared = self._ragged and nodes < most
        scores = drafts[1].new_empty(len(anchors), most) if shared else None
        grown = ops.build_draft_tree(anchors, *drafts, most - 1, *branch, scores=scores)
        tree = DraftTree(*grown)
        if scores is None:
            return tree
        log_probs = scores.numpy()  # few operations on little: NumPy's start faster than torch's
        self._prices.observe(log_probs[:, 1:])
        counts = (log_probs >= self._prices.least(nodes - 1)).sum(1)
        return tree.cut(torch.from_numpy(counts))

    def weigh(self, look_up: Proposal, odds: int) -> None:
        """Say how many tokens of a look-up pay, where requests may differ.

        Args:
            odds: least probability of a token that pays, in thousandths.
        """
        if self._ragged:
            look_up.worth = self._odds.worth(look_up.match, self._longest, odds)

    def learn(self, look_up: Proposal, right: torch.Tensor, commit_lens: torch.Tensor) -> None:
        """Learn what look-ups are worth as branches.

        Args:
            look_up: of the step that has run.
            right: [bs] tokens of it that were committed before the first other one.
            commit_lens: [bs].
        """
        self._odds.note(look_up.match, commit_lens, right, look_up.found.shape[1])


def _chains(anchors: torch.Tensor, look_up: Proposal, nodes: int) -> DraftTree:
    """Look-ups alone: what pays of so many rows; all of them where that is not known."""
    bs = len(anchors)
    row = torch.arange(nodes, dtype=torch.int32).repeat(bs, 1)
    tokens = torch.cat((anchors[:, None], look_up.found[:, : nodes - 1]), 1)
    tree = DraftTree(tokens, row - 1, row)
    return tree if look_up.worth is None else tree.cut((look_up.worth + 1).clamp(max=nodes))
