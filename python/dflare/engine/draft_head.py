"""A draft head over the tokens that a checkpoint names, its draft vocabulary.

A drafter's last product is with the target's head, all of the vocabulary, and for small drafters
the largest part of a draft. Most of a vocabulary is hardly ever said: with the rows of the frequent
tokens alone (FR-Spec, arXiv 2502.14856) the others are never drafted, and nothing else changes.
"""

import logging
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.dflash_utils import is_dense_head_weight
from sglang.srt.speculative.dflash_worker_v2 import _DflashDraftSampler

from dflare.checkpoint import draft_vocabulary
from dflare.engine.cpu_layers import greedy_tokens

logger = logging.getLogger(__name__)


class DraftHead:
    """Some rows of the target's head, whole on every rank, and the tokens that they stand for.

    Hidden states are the same on all ranks, so every rank finds the same tokens without a word.

    Attributes:
        weight: [V', H], the target's dtype.
        ids: [V'] int64, ascending.
    """

    def __init__(self, lm_head: Any, ids: torch.Tensor) -> None:
        """
        Args:
            lm_head: SGLang's head of the target, this rank's part of it, not quantised.
            ids: [V'] int64 token ids, ascending.
        """
        self.ids = ids
        self.weight = self._rows(lm_head, ids)

    def renew(self, lm_head: Any, ids: torch.Tensor) -> None:
        """Stand for other tokens, as many, in place: captured graphs hold the addresses."""
        self.weight.copy_(self._rows(lm_head, ids))
        self.ids.copy_(ids)

    @staticmethod
    def _rows(lm_head: Any, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the head for some tokens, from all ranks: [V', H]."""
        own, place = torch.ones_like(ids, dtype=torch.bool), ids
        if shard := getattr(lm_head, "shard_indices", None):
            first = shard.org_vocab_start_index
            own = (ids >= first) & (ids < first + shard.num_org_elements)
            place = (ids - first).where(own, 0)
        rows = lm_head.weight.data[place] * own[:, None]
        if shard is not None and get_parallel().tp_size > 1:
            rows = get_parallel().tp_group.all_reduce(rows)
        return rows

    def greedy_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Most probable token of each row of final hidden states [rows, H]: [rows] int64."""
        if hidden.is_cpu:
            return self.ids[greedy_tokens(hidden, self.weight)]
        return self.ids[(hidden.to(self.weight.dtype) @ self.weight.T).argmax(-1)]


class DraftHeadSampler(_DflashDraftSampler):
    """What a captured draft ends with: as DFLASH's, over a `DraftHead`."""

    def __init__(self, head: DraftHead, block_size: int, max_batch: int) -> None:
        """
        Args:
            head: gives the rows and their tokens.
            block_size: B.
            max_batch: largest batch that is captured.
        """
        super().__init__(
            weight=head.weight,
            block_size=block_size,
            num_org=len(head.ids),
            org_vocab_start=0,
            max_bs=max_batch,
        )
        self._ids = head.ids

    def __call__(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> None:
        """Leave the tokens of final hidden states [bs * B, H] at the front of `out`."""
        super().__call__(hidden_states, input_ids)
        drafted = len(hidden_states) // self.block_size * (self.block_size - 1)
        self.out[:drafted] = self._ids[self.out[:drafted]]


def make_draft_head(draft_model: Any, lm_head: Any) -> DraftHead | None:
    """Take the rows of the drafter's own vocabulary; None where it drafts every token.

    Args:
        draft_model: a loaded `QwenDFlareDraftModel`.
        lm_head: SGLang's head of the target.
    """
    if getattr(draft_model, "d2t", None) is None:
        return None
    if not is_dense_head_weight(getattr(lm_head, "weight", None)):
        logger.warning("DFLARE: the target's head is quantised: drafts are taken from all of it")
        return None
    return DraftHead(lm_head, drafted_tokens(draft_model).to(lm_head.weight.device))


def drafted_tokens(draft_model: Any) -> torch.Tensor:
    """The tokens that a drafter with a draft vocabulary names, [V'] int64, ascending."""
    return draft_vocabulary(draft_model.d2t.data, draft_model.draft_config.vocab_size)
