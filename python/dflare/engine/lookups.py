"""Look-ups: what followed the same words earlier in a request, proposed again.

The text of a request is kept as its keys and values are: one token a slot of the pool, written on
the same stream by the step that writes them. So chunks, radix hits, retraction, rejected proposals
and steps in flight leave in it what they leave in the cache, on every rank alike, and nothing is
kept by request.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dflare import ops
from dflare.adaptive import LEAST_MATCH, Comparison


class Texts:
    """The token of every slot of the target's K/V pool."""

    def __init__(self, runner: Any, *, prefixes: bool) -> None:
        """
        Args:
            runner: the target's `ModelRunner`.
            prefixes: whether slots may be filled by others than the worker's batches (HiCache), so
                that a prefill must write the tokens of its prefix too.
        """
        pool = runner.token_to_kv_pool
        slots = pool.size + pool.page_size
        self._tokens = torch.zeros(slots, dtype=torch.int32, device=runner.device)
        self._table = runner.req_to_token_pool.req_to_token
        self._prefixes = prefixes

    def write(self, batch: Any, *, prefill: bool = False) -> None:
        """Note the tokens whose keys and values a verification, or a prefill, has just written."""
        self._tokens[batch.out_cache_loc] = batch.input_ids.int()
        if not (prefill and self._prefixes):
            return
        for req, prefix in zip(batch.reqs, batch.prefix_lens, strict=True):
            text = [*req.origin_input_ids, *req.output_ids][:prefix]
            tokens = torch.tensor(text, dtype=torch.int32).to(self._table.device, non_blocking=True)
            self._tokens[self._table[req.req_pool_idx, : len(text)].long()] = tokens

    def look_up(self, batch: Any, count: int) -> "Proposal":
        """Propose `count` tokens behind the anchors of a decode batch."""
        found, match = ops.lookup_continuations(
            self._tokens,
            self._table,
            batch.req_pool_indices,
            batch.seq_lens,
            batch.spec_info.bonus_tokens.view(-1),
            count,
            least_match=LEAST_MATCH,
        )
        return Proposal(found, match)


class Proposal:
    """What a look-up proposes in one step, beside what the drafter does."""

    def __init__(self, found: torch.Tensor, match: torch.Tensor) -> None:
        """
        Args:
            found: [bs, w] int64, tokens that may follow the anchors.
            match: [bs] int32, tokens before them that match; 0: there is no proposal.
        """
        self.found, self.match = found, match
        self.drafts: torch.Tensor | None = None
        self.agreed: torch.Tensor | None = None

    def splice(self, drafts: torch.Tensor, least_strength: int) -> None:
        """Put the look-up's tokens in place of the drafter's where they are as well founded.

        Args:
            drafts: [bs, w - 1] int64, changed in place.
            least_strength: of `Comparison.strength`.
        """
        self.drafts = drafts.clone()
        found = self.found[:, : drafts.shape[1]]
        self.agreed = _leading(drafts == found)
        strength = torch.where(self.match > 0, self.match + self.agreed, 0)
        drafts.copy_(torch.where((strength >= least_strength)[:, None], found, drafts))

    def right(self, tokens: torch.Tensor, commit_lens: torch.Tensor) -> torch.Tensor:
        """How many of the look-up's tokens were committed before the first other one, [bs] int32.

        Args:
            tokens: [bs, w] int64, of which the first `commit_lens` [bs] of each row are committed.
        """
        width = tokens.shape[1]
        committed = torch.arange(width, device=tokens.device) < commit_lens[:, None]
        return _leading((self.found[:, :width] == tokens) & committed) * (self.match > 0)

    def compare(self, tokens: torch.Tensor, commit_lens: torch.Tensor) -> Callable[[], Comparison]:
        """Hold the proposals against what was committed.

        Args:
            tokens: [bs, w] int64, of which the first `commit_lens` [bs] of each row are committed.

        Returns:
            Gives the comparison, once the step's own result is on the host.
        """
        committed = torch.arange(tokens.shape[1], device=tokens.device) < commit_lens[:, None]
        right = self.right(tokens, commit_lens)
        agreed, drafted = torch.full_like(self.match, -1), torch.zeros_like(self.match)
        if self.drafts is not None and self.agreed is not None:
            agreed = self.agreed
            drafted = _leading((self.drafts == tokens[:, :-1]) & committed[:, :-1])
        on_host = _to_host(torch.stack((self.match, right, agreed, drafted)))
        return lambda: Comparison(*on_host.numpy().astype(np.int64))


def _leading(true: torch.Tensor) -> torch.Tensor:
    """How many of each row are true before the first that is not, [bs] int32."""
    return true.int().cumprod(1, dtype=torch.int32).sum(1, dtype=torch.int32)


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy that arrives before whatever is copied later behind the same stream."""
    if x.is_cpu:
        return x
    on_host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return on_host.copy_(x, non_blocking=True)
