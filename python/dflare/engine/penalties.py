"""Frequency, presence and repetition penalties and min_new_tokens of speculative batches.

SGLang 0.5.23 feeds the tokens of a speculative batch to no penalizer and its DFLASH verification
reads none. Here each verify position sees what a decode step at that position would see: the
tokens generated before the step and, in the block, those before it. The same counts penalise the
token that a prefill samples, for a request that has generated before (one that was retracted, or
decodes on in a mixed batch). All counts stay on the device, so that overlap scheduling, which knows
tokens on the host one step later, is served too, and no method waits for the device.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.utils import async_h2d

from dflare.engine.swapping import swapped
from dflare.ops import tree_ancestors

_CHUNK = 16  # requests whose logits are copied at a time


@dataclass(frozen=True)
class Penalised:
    """The requests of a batch that ask for a penalty; tensors on the device.

    Attributes:
        at: [p] rows of the batch.
        rows: [p] rows of the counts.
        frequency, presence, repetition: [p, 1] float32.
        min_new_tokens: [p, 1].
        stops: for each stop token of each of them [2, s]: which of the p, which token.
    """

    at: torch.Tensor
    rows: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor
    repetition: torch.Tensor
    min_new_tokens: torch.Tensor
    stops: torch.Tensor


class Penalties:
    """Counts the generated tokens of penalised requests and applies their penalties.

    The counts of a request live in a row that belongs to its row of SGLang's `req_to_token`, which
    it keeps until it ends or is retracted. Whose the counts are is written down beside them: a
    request that comes from a prefill elsewhere (disaggregation) or from a backup on the host never
    meets a prefill here, and starts at its first decode step.
    """

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        """
        Args:
            vocab_size: V.
            device: of the logits.
        """
        self._vocab_size, self._device = vocab_size, torch.device(device)
        self._rows: dict[int, int] = {}  # row of the counts by row of req_to_token
        self._owners: dict[int, tuple[weakref.ref, int]] = {}  # by row of the counts
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)

    def select(self, batch: Any) -> Penalised | None:
        """Find the requests of a batch that ask for a penalty, and see to it that they are counted.

        Args:
            batch: SGLang's `ScheduleBatch`, any mode.

        Returns:
            What the other methods need of them, or None if there are none.
        """
        chosen = [
            (at, req)
            for at, req in enumerate(batch.reqs or ())
            if _is_penalised(req.sampling_params)
        ]
        if not chosen:
            return None
        reqs = [req for _, req in chosen]
        rows = [self._row(req.kv.req_pool_idx) for req in reqs]
        # A prefill starts a request, but not those that decode on in a mixed batch.
        prefill = batch.forward_mode.is_extend() or batch.is_extend_in_batch
        decoding = {id(req) for req in batch.decoding_reqs or ()} if prefill else set(map(id, reqs))
        self._start(
            (row, req)
            for row, req in zip(rows, reqs, strict=True)
            if id(req) not in decoding or not self._is_owner(row, req)
        )
        params = [req.sampling_params for req in reqs]
        stops = [
            (i, token)
            for i, req in enumerate(reqs)
            if req.sampling_params.min_new_tokens > 0
            for token in sorted(_stop_tokens(req))
            if token < self._vocab_size
        ]
        return Penalised(
            at=self._put([at for at, _ in chosen], torch.long),
            rows=self._put(rows, torch.long),
            frequency=self._put([[p.frequency_penalty] for p in params], torch.float32),
            presence=self._put([[p.presence_penalty] for p in params], torch.float32),
            repetition=self._put([[p.repetition_penalty] for p in params], torch.float32),
            min_new_tokens=self._put([[p.min_new_tokens] for p in params], torch.long),
            stops=self._put(stops, torch.long).reshape(-1, 2).T,
        )

    def _put(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return async_h2d(values, dtype=dtype, device=self._device)

    def _row(self, pool_row: int) -> int:
        row = self._rows.setdefault(pool_row, len(self._rows))
        if row >= len(self._counts):
            more = max(1, len(self._counts))
            self._counts = torch.nn.functional.pad(self._counts, (0, 0, 0, more))
        return row

    def _is_owner(self, row: int, req: Any) -> bool:
        """Whether the counts are this request's, since it was last retracted."""
        owner = self._owners.get(row)
        return owner is not None and owner == (weakref.ref(req), req.retraction_count)

    def _start(self, starting: Iterable[tuple[int, Any]]) -> None:
        """Count what requests have generated so far: at such a moment the host knows it all."""
        rows: list[int] = []
        counted_in: list[int] = []
        tokens: list[int] = []
        for row, req in starting:
            self._owners[row] = weakref.ref(req), req.retraction_count
            rows.append(row)
            counted_in += [row] * len(req.output_ids)
            tokens += req.output_ids
        if rows:
            self._counts.index_fill_(0, self._put(rows, torch.long), 0)
        if tokens:
            ids = self._put(tokens, torch.long)
            self._add(self._put(counted_in, torch.long), ids, torch.ones_like(ids))

    @contextmanager
    def in_prefill(self, chosen: Penalised, sampling_info: Any) -> Iterator[None]:
        """Let SGLang's sampler apply the penalties to the token after a prefill.

        Args:
            chosen: of the batch's requests.
            sampling_info: the batch's `SamplingBatchInfo` of bs requests.
        """
        size = len(sampling_info), self._vocab_size
        counts = self._counts[chosen.rows]
        lower = counts * -chosen.frequency - (counts > 0) * chosen.presence
        if chosen.stops.numel():
            first = torch.zeros_like(chosen.min_new_tokens)
            self._hold_stops_back(chosen, lower[:, None], chosen.stops[0], first)
        additive = torch.zeros(size, device=self._device).index_copy_(0, chosen.at, lower)
        scale = torch.where(counts > 0, chosen.repetition, 1.0)
        scaling = torch.ones(size, device=self._device).index_copy_(0, chosen.at, scale)
        with swapped(
            sampling_info,
            penalizer_orchestrator=None,
            acc_additive_penalties=additive,
            acc_scaling_penalties=scaling,
        ):
            yield

    @contextmanager
    def in_verification(
        self,
        chosen: Penalised,
        sampling_info: Any,
        verified: Callable[[], tuple[torch.Tensor, torch.Tensor | None]],
    ) -> Iterator[None]:
        """Let the hook on DFLASH's logit adjustments apply the penalties at every position.

        Args:
            chosen: of the batch's requests.
            sampling_info: the batch's; it outlives the step, and the requests may not.
            verified: gives the tokens [>= bs, B] that are verified, once they are drafted, and
                their parents [>= bs, B] if they are trees.
        """

        def penalise(logits: torch.Tensor, width: int) -> None:
            block, parents = verified()
            bs = len(logits) // width
            self.apply(chosen, logits, block[:bs], None if parents is None else parents[:bs])

        sampling_info.dflare_penalise = penalise
        try:
            yield
        finally:
            del sampling_info.dflare_penalise

    def commit_prefill(self, chosen: Penalised, next_tokens: torch.Tensor) -> None:
        """Count the tokens [bs] that a prefill gave; after a chunk that is not the last, it starts
        anew anyway."""
        first = next_tokens[chosen.at].long()
        self._add(chosen.rows, first, torch.ones_like(first))

    def commit(self, chosen: Penalised, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """Count the tokens that a verification committed.

        Args:
            chosen: of the batch's requests.
            tokens: [bs, B]; lengths: [bs] how many of each row count.
        """
        tokens = tokens[chosen.at].long()
        column = torch.arange(tokens.shape[1], device=tokens.device)
        counted = column < lengths[chosen.at, None]
        rows = chosen.rows[:, None].expand_as(tokens)
        # Uncommitted columns hold whatever was there: they add nothing to token 0.
        self._add(rows, torch.where(counted, tokens, 0), counted)

    def _add(self, rows: torch.Tensor, tokens: torch.Tensor, by: torch.Tensor) -> None:
        index = rows.flatten() * self._vocab_size + tokens.flatten()
        self._counts.view(-1).index_add_(0, index, by.flatten().int())

    def apply(
        self,
        chosen: Penalised,
        logits: torch.Tensor,
        block: torch.Tensor,
        parents: torch.Tensor | None = None,
    ) -> None:
        """Penalise the logits of a verification in place.

        Args:
            chosen: of the batch's requests.
            logits: [bs * B, V]; row i of a request's B gives the token after block[i].
            block: [bs, B] anchor and drafted tokens. The anchor is counted already.
            parents: [bs, B] int32, the parent of each, -1 for the anchor; None for chains.
        """
        width = block.shape[1]
        if parents is None:
            behind = torch.ones(width, width, dtype=torch.bool, device=logits.device).tril()
            ancestors = behind.expand(len(chosen.at), -1, -1)
        else:
            ancestors = tree_ancestors(parents[chosen.at])
        by_request = logits.view(-1, width, logits.shape[-1])
        for begin in range(0, len(chosen.at), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            at, rows = chosen.at[part], chosen.rows[part]
            strength = [
                x[part, :, None] for x in (chosen.frequency, chosen.presence, chosen.repetition)
            ]
            counts = self._counts[rows]
            before = by_request[at]
            after = _penalise(before, counts[:, None], *strength)
            # The block's own tokens count more behind them.
            drafted = block[at].long()
            same = drafted[:, None, 1:] == drafted[:, :, None]  # [p, k, k'] token k is token k'
            earlier = ancestors[part, :, 1:].float()  # [p, i, k']
            more = torch.einsum("pkj,pij->pik", same.float(), earlier).int()
            tokens = drafted[:, None].expand(-1, width, -1)
            exact = counts.gather(1, drafted)[:, None] + more
            after.scatter_(2, tokens, _penalise(before.gather(2, tokens), exact, *strength))
            by_request[at] = after
        if chosen.stops.numel():
            depths = ancestors.sum(-1) - 1
            self._hold_stops_back(chosen, by_request, chosen.at[chosen.stops[0]], depths)

    def _hold_stops_back(
        self, chosen: Penalised, logits: torch.Tensor, at: torch.Tensor, depths: torch.Tensor
    ) -> None:
        """Forbid stop tokens before min_new_tokens, in place.

        Args:
            chosen: of the batch's requests.
            logits: [n, B, V].
            at: [s] the row of `logits` for each stop token.
            depths: [p, B] how many tokens each of the B positions is behind the first.
        """
        row, token = chosen.stops
        generated = self._counts[chosen.rows].sum(1, keepdim=True)
        early = generated + depths < chosen.min_new_tokens  # [p, B]
        held = logits[at, :, token].masked_fill(early[row], float("-inf"))
        logits[at, :, token] = held


def _is_penalised(params) -> bool:
    return (
        params.frequency_penalty != 0
        or params.presence_penalty != 0
        or params.repetition_penalty != 1
        or params.min_new_tokens > 0
    )


def _stop_tokens(req) -> set[int]:
    """As SGLang's BatchedMinNewTokensPenalizer collects them."""
    return {
        token
        for token in (
            *(req.sampling_params.stop_token_ids or ()),
            *(req.eos_token_ids or ()),
            *(req.tokenizer.additional_stop_token_ids or ()),
            req.tokenizer.eos_token_id,
        )
        if token is not None
    }


def _penalise(
    logits: torch.Tensor,
    counts: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    repetition: torch.Tensor,
) -> torch.Tensor:
    """SGLang's order: what is subtracted first, what scales then (sampling_batch_info.py)."""
    seen = counts > 0
    lower = logits - (counts * frequency + seen * presence)
    scale = torch.where(seen, repetition, 1.0)
    return torch.where(lower < 0, lower * scale, lower / scale).to(logits.dtype)
