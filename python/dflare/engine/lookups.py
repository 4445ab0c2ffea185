"""Look-ups: what followed the same words earlier in a request, proposed again.

The text of a request is kept as its keys and values are: one token a slot of the pool, written on
the same stream by the step that writes them. So chunks, radix hits, retraction, rejected proposals
and steps in flight leave in it what they leave in the cache, on every rank alike, and nothing is
kept by request.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from dflare import ops
from dflare.adaptive import LEAST_MATCH, NEVER, Comparison


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

    def write_prefixes(self, batch: Any) -> None:
        """Note the tokens of the prefixes that a prefill will find in the cache."""
        if not self._prefixes:
            return
        for req, prefix in zip(batch.reqs, batch.prefix_lens, strict=True):
            text = [*req.origin_input_ids, *req.output_ids][:prefix]
            tokens = torch.tensor(text, dtype=torch.int32).to(self._table.device, non_blocking=True)
            self._tokens[self._table[req.req_pool_idx, : len(text)].long()] = tokens

    def write_prefill(self, batch: Any) -> None:
        """Note the tokens whose keys and values a prefill has just written."""
        self._tokens[batch.out_cache_loc] = batch.input_ids.int()

    def look_up(self, batch: Any, slots: torch.Tensor) -> "Proposal":
        """Propose tokens behind the anchors of a decode batch.

        Args:
            slots: [bs, w] int64, of the anchors and what follows them: as many are proposed.
        """
        anchors = batch.spec_info.bonus_tokens.view(-1)
        found, match = ops.lookup_continuations(
            self._tokens,
            self._table,
            batch.req_pool_indices,
            batch.seq_lens,
            anchors,
            slots.shape[1],
            least_match=LEAST_MATCH,
        )
        return Proposal(found, match, anchors, slots)

    def write_committed(self, proposal: "Proposal", tokens: torch.Tensor) -> None:
        """Note what a verification has committed; what lies behind it is written again later.

        A tree's path has been moved to the first of the step's slots by then.

        Args:
            proposal: of the step.
            tokens: [bs, S] int64, what the step has committed behind the anchors, S <= w.
        """
        held = torch.cat((proposal.anchors[:, None], tokens[:, :-1]), dim=1)
        self._tokens[proposal.slots[:, : tokens.shape[1]]] = held.int()


class Proposal:
    """What a look-up proposes in one step, beside what the drafter does."""

    def __init__(
        self, found: torch.Tensor, match: torch.Tensor, anchors: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """
        Args:
            found: [bs, w] int64, tokens that may follow the anchors.
            match: [bs] int32, tokens before them that match; 0: there is no proposal.
            anchors: [bs] int64.
            slots: [bs, w] int64, of the anchors and what follows them.

        Attributes:
            worth: [bs] int64, tokens that pay, where requests may differ.
        """
        self.found, self.match, self.anchors, self.slots = found, match, anchors, slots
        self.worth: torch.Tensor | None = None
        self.drafts: torch.Tensor | None = None
        self.agreed: torch.Tensor | None = None

    def pays_nothing(self) -> bool:
        """Whether a step of look-ups alone would verify nothing but anchors."""
        return self.worth is not None and not self.worth.any()

    def splice(self, drafts: torch.Tensor, least_strength: int) -> None:
        """Put the look-up's tokens in place of the drafter's where they are as well founded.

        Args:
            drafts: [bs, w - 1] int64, changed in place.
            least_strength: of `Comparison.strength`.
        """
        self.drafts = drafts.clone()
        found = self.found[:, : drafts.shape[1]]
        self.agreed = _leading(drafts == found)
        if least_strength < NEVER:
            taken = (self.match > 0) & (self.match + self.agreed >= least_strength)
            drafts.copy_(torch.where(taken[:, None], found, drafts))

    def right(self, tokens: torch.Tensor, commit_lens: torch.Tensor) -> torch.Tensor:
        """How many of the tokens proposed were committed before the first other one.

        Args:
            tokens: [bs, w] int64, of which the first `commit_lens` [bs] of each row are committed.

        Returns:
            [1, bs] int32, of the look-ups; if the drafter proposed too, [2, bs], its own below.
        """
        width = tokens.shape[1]
        committed = torch.arange(width, device=tokens.device) < commit_lens[:, None]
        proposals = self.found[None, :, :width]
        if self.drafts is not None:
            proposals = torch.stack((proposals[0], pad(self.drafts, (0, 1), value=-1)))
        return _leading((proposals == tokens) & committed)

    def compare(self, right: torch.Tensor) -> Callable[[], Comparison]:
        """Hold the proposals against what was committed.

        Args:
            right: from the method of this name.

        Returns:
            Gives the comparison, once the step's own result is on the host.
        """
        known = [self.match[None]] if self.agreed is None else [self.match[None], self.agreed[None]]
        on_host = _to_host(torch.cat((*known, right)))
        # Requests differ on a CPU alone.
        worth = () if self.worth is None else (self.worth.numpy(),)
        return lambda: _comparison(on_host.numpy().astype(np.int64), *worth)


def _comparison(rows: npt.NDArray[np.int64], *worth: npt.NDArray[np.int64]) -> Comparison:
    """From the match and the look-up's right tokens, or both with what the drafter adds."""
    if len(rows) == 2:
        match, right = rows
        agreed, drafted = np.full_like(match, -1), np.zeros_like(match)
    else:
        match, agreed, right, drafted = rows
    return Comparison(match, right * (match > 0), agreed, drafted, *worth)


def _leading(true: torch.Tensor) -> torch.Tensor:
    """How many along the last dimension are true before the first that is not, int32."""
    return true.cumprod(-1, dtype=torch.int32).sum(-1, dtype=torch.int32)


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy that arrives before whatever is copied later behind the same stream."""
    if x.is_cpu:
        return x
    on_host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return on_host.copy_(x, non_blocking=True)
