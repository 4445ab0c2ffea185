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

from dflare import ops
from dflare.checkpoint import draft_vocabulary

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
        tokens = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
        ops.head_argmax(hidden.to(self.weight.dtype), self.weight, tokens, ids=self.ids)
        return tokens


class DraftHeadSampler:
    """What a captured draft ends with: the tokens of its blocks, by `head_argmax`.

    It takes the place of DFLASH's, which computes the logits of all tokens, then their argmax.

    Attributes:
        out: [max_batch * (B - 1)] int64; SGLang reads a step's tokens at its front.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        block_size: int,
        max_batch: int,
        ids: torch.Tensor | None = None,
        first_id: int = 0,
        group: Any = None,
    ) -> None:
        """
        Args:
            weight: [V, H], a head or this rank's part of it.
            block_size: B.
            max_batch: largest batch that is captured.
            ids: [V] int64 tokens of the rows, ascending; by default they follow `first_id`.
            first_id: token of the first row.
            group: SGLang's group of the ranks that hold the other parts; None if this is all.
        """
        self.block_size = block_size
        self.out = torch.empty(
            max_batch * (block_size - 1), dtype=torch.int64, device=weight.device
        )
        self._weight, self._ids, self._first_id, self._group = weight, ids, first_id, group

    def __call__(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> None:
        """Leave the tokens of final hidden states [bs * B, H] at the front of `out`."""
        tokens = self.out[: len(hidden_states) // self.block_size * (self.block_size - 1)]
        keys = ops.head_argmax(
            hidden_states.to(self._weight.dtype),
            self._weight,
            tokens,
            block_size=self.block_size,
            ids=self._ids,
            first_id=self._first_id,
        )
        if self._group is not None:
            parts = keys.new_empty(self._group.world_size * len(keys))
            self._group.all_gather_into_tensor(parts, keys)
            tokens.copy_(ops.token_of(parts.view(-1, len(keys)).amax(0)))


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
