"""Frequency, presence and repetition penalties and min_new_tokens at every verify position.

SGLang 0.5.23 feeds the tokens of a speculative batch to no penalizer and its DFLASH verification
reads none. Here each verify position sees what a decode step at that position would see: the
tokens generated before the step and, in the block, those before it. All counts stay on the
device, so that overlap scheduling, which knows tokens on the host one step later, is served too.
"""

from dataclasses import dataclass

import torch

_CHUNK = 16  # requests whose logits are copied at a time


@dataclass(frozen=True)
class _Penalised:
    """The requests of a batch that ask for a penalty; tensors on the device.

    Attributes:
        at: [p] rows of the batch.
        slots: [p] rows of the counts.
        frequency, presence, repetition: [p, 1] float32.
        min_new_tokens: [p, 1].
        stops: for each stop token of each of them [2, s]: which of the p, which token.
    """

    at: torch.Tensor
    slots: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor
    repetition: torch.Tensor
    min_new_tokens: torch.Tensor
    stops: torch.Tensor


class VerifyPenalties:
    """Counts the generated tokens of penalised requests and applies their penalties.

    Args:
        vocab_size: V.
        device: of the logits.
    """

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size, self._device = vocab_size, device
        # By row of req_to_token, which a request keeps from its prefill to its end.
        self._slots: dict[int, int] = {}
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)

    def select(self, reqs) -> _Penalised | None:
        """Return what verification needs of a batch's requests, or None if none is penalised."""
        chosen = [(at, req) for at, req in enumerate(reqs) if _is_penalised(req.sampling_params)]
        if not chosen:
            return None
        params = [req.sampling_params for _, req in chosen]
        stops = [
            (row, token)
            for row, (_, req) in enumerate(chosen)
            if req.sampling_params.min_new_tokens > 0
            for token in sorted(_stop_tokens(req))
            if token < self._vocab_size
        ]

        def put(values: list, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(self._device, non_blocking=True)

        return _Penalised(
            at=put([at for at, _ in chosen], torch.long),
            slots=put([self._slot(req.kv.req_pool_idx) for _, req in chosen], torch.long),
            frequency=put([[p.frequency_penalty] for p in params], torch.float32),
            presence=put([[p.presence_penalty] for p in params], torch.float32),
            repetition=put([[p.repetition_penalty] for p in params], torch.float32),
            min_new_tokens=put([[p.min_new_tokens] for p in params], torch.long),
            stops=put(stops, torch.long).reshape(-1, 2).T,
        )

    def _slot(self, pool_row: int) -> int:
        slot = self._slots.setdefault(pool_row, len(self._slots))
        if slot >= len(self._counts):
            more = max(1, len(self._counts))
            self._counts = torch.nn.functional.pad(self._counts, (0, 0, 0, more))
        return slot

    def start(self, chosen: _Penalised, reqs, first_tokens: torch.Tensor) -> None:
        """Begin to count after a prefill.

        Args:
            chosen: of these requests.
            reqs: the batch's requests; what they have generated before (a retracted request has)
                is known to the host when they are prefilled.
            first_tokens: [bs] the token that the prefill gave each.
        """
        self._counts[chosen.slots] = 0
        known = [req.output_ids for req in reqs if _is_penalised(req.sampling_params)]
        lengths = torch.tensor([len(ids) for ids in known], device=self._device)
        if lengths.any():
            tokens = torch.tensor([t for ids in known for t in ids], device=self._device)
            self._add(chosen.slots.repeat_interleave(lengths), tokens, torch.ones_like(tokens))
        first = first_tokens[chosen.at].long()
        self._add(chosen.slots, first, torch.ones_like(first))

    def commit(self, chosen: _Penalised, tokens: torch.Tensor, lengths: torch.Tensor) -> None:
        """Count the tokens that a verification committed.

        Args:
            chosen: of the batch's requests.
            tokens: [bs, B]; lengths: [bs] how many of each row count.
        """
        tokens = tokens[chosen.at].long()
        column = torch.arange(tokens.shape[1], device=tokens.device)
        counted = column < lengths[chosen.at, None]
        slots = chosen.slots[:, None].expand_as(tokens)
        # Uncommitted columns hold whatever was there: they add nothing to token 0.
        self._add(slots, torch.where(counted, tokens, 0), counted)

    def _add(self, slots: torch.Tensor, tokens: torch.Tensor, by: torch.Tensor) -> None:
        index = slots.flatten() * self._vocab_size + tokens.flatten()
        self._counts.view(-1).index_add_(0, index, by.flatten().int())

    def apply(self, chosen: _Penalised, logits: torch.Tensor, block: torch.Tensor) -> None:
        """Penalise the logits of a verification in place.

        Args:
            chosen: of the batch's requests.
            logits: [bs * B, V]; row i of a request's B gives the token after block[i].
            block: [bs, B] anchor and drafted tokens. The anchor is counted already.
        """
        width = block.shape[1]
        by_request = logits.view(-1, width, logits.shape[-1])
        for begin in range(0, len(chosen.at), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            at, slots = chosen.at[part], chosen.slots[part]
            strength = [
                x[part, :, None] for x in (chosen.frequency, chosen.presence, chosen.repetition)
            ]
            counts = self._counts[slots]
            before = by_request[at]
            after = _penalise(before, counts[:, None], *strength)
            # The block's own tokens count more at later positions.
            drafted = block[at].long()
            same = drafted[:, None, 1:] == drafted[:, :, None]  # [p, k, k'] token k is token k'
            earlier = torch.ones(width, width, device=logits.device).tril()[:, 1:]  # [i, k']
            more = torch.einsum("pkj,ij->pik", same.float(), earlier).int()
            tokens = drafted[:, None].expand(-1, width, -1)
            exact = counts.gather(1, drafted)[:, None] + more
            after.scatter_(2, tokens, _penalise(before.gather(2, tokens), exact, *strength))
            by_request[at] = after
        self._hold_stops_back(chosen, by_request)

    def _hold_stops_back(self, chosen: _Penalised, logits: torch.Tensor) -> None:
        if not chosen.stops.numel():
            return
        row, token = chosen.stops
        generated = self._counts[chosen.slots].sum(1, keepdim=True)
        position = torch.arange(logits.shape[1], device=logits.device)
        early = generated + position < chosen.min_new_tokens  # [p, B]
        at = chosen.at[row]
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
