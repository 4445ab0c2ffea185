"""What the engine's look-ups would propose at every position of answers that are known."""

from typing import NamedTuple

import numpy as np
import torch

from dflare.adaptive import LEAST_MATCH
from dflare.branch import BranchOdds
from dflare.ops import lookup_continuations


class LookUps(NamedTuple):
    """Look-ups at the anchors of one answer of L tokens, as :class:`DraftTable` has them.

    Args:
        found: ``[L-1, C]`` int64, proposed tokens.
        match: ``[L-1]`` int32, tokens that match before them; 0: there is no proposal.
        right: ``[L-1]`` int64, how many are the answer's own before the first other one.
    """

    found: torch.Tensor
    match: torch.Tensor
    right: np.ndarray

    def branches(self, odds: BranchOdds) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As branches of trees: tokens, log-probabilities and lengths."""
        return odds.branches(self.found, self.match)

    def teach(self, odds: BranchOdds) -> None:
        """Let all anchors of the answer be seen."""
        count = self.found.shape[1]
        left = torch.arange(len(self.match), 0, -1).clamp(max=count)
        odds.observe(self.match, left, torch.from_numpy(self.right), count)


def look_ups(prompt: list[int], answer: list[int], count: int) -> LookUps:
    """Look up ``count`` tokens behind every token of an answer but its last."""
    text = torch.tensor(prompt + answer)
    anchors = torch.tensor(answer[:-1])
    before = len(prompt) + torch.arange(len(anchors))
    found, match = lookup_continuations(
        text.int(),
        torch.arange(len(text), dtype=torch.int32)[None],
        torch.zeros_like(anchors),
        before,
        anchors,
        count,
        least_match=LEAST_MATCH,
    )
    ended = torch.full((count,), -1)
    true = torch.cat([text, ended])[before[:, None] + 1 + torch.arange(count)]
    right = (found == true).long().cumprod(1).sum(1) * (match > 0)
    return LookUps(found, match, right.numpy())
