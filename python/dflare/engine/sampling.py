"""Sampling the target's tokens where SGLang's verification kernel is missing or says too little.

The kernel knows temperature, top-k and top-p. Requests with min_p or a seed of their own, and
devices without the kernel, are sampled here.
"""

import dataclasses
import random
from typing import Any

import torch
from sglang.srt.layers.sampler import (
    multinomial_with_seed,
    sampling_from_probs_torch,
    top_k_top_p_min_p_sampling_from_probs_torch,
)
from sglang.srt.utils import async_h2d

_SEED_BITS = 2**63 - 1
# Of one [rows, V] float32 matrix. Sampling takes three to six of them at once: for 256 requests of
# 16 tokens of a vocabulary of 151,936, more than SGLang leaves free on a GPU of 141 GB.
_PART_BYTES = 2**29
_PART_LOGITS = 128  # divides the vocabularies of Llama, Qwen and SmolLM2


def seeds_of(batch: Any) -> torch.Tensor | None:
    """The seeds of a batch in which some request gives one.

    SGLang itself looks at `sampling_seed` with --enable-deterministic-inference only, and drops it
    without a word otherwise.

    Args:
        batch: SGLang's `ScheduleBatch`.

    Returns:
        [bs] int64, at random for requests that give none; None if no request does, or all are
        greedy.
    """
    info = batch.sampling_info
    if info is None or info.is_all_greedy:
        return None
    if info.sampling_seed is not None:
        return info.sampling_seed
    given = [req.sampling_params.sampling_seed for req in batch.reqs]
    if all(seed is None for seed in given):
        return None
    seeds = [random.getrandbits(63) if seed is None else seed & _SEED_BITS for seed in given]
    return async_h2d(seeds, dtype=torch.int64, device=info.temperatures.device)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first of the highest logits of each row.

    On a CPU torch's own `argmax` compares number by number; the highest of each part of a row is
    found by vectors, and parts and the best one's numbers are few.

    Args:
        logits: [N, V].

    Returns:
        [N] int64, as `logits.argmax(-1)` has it, with NaN and ties.
    """
    rows, vocab_size = logits.shape
    if not logits.is_cpu or not logits.is_contiguous() or vocab_size % _PART_LOGITS:
        return logits.argmax(-1)
    parts = logits.view(rows, -1, _PART_LOGITS)
    best = parts.amax(-1).argmax(-1)
    return best * _PART_LOGITS + parts[torch.arange(rows), best].argmax(-1)


def requests_at_once(rows: int, vocab_size: int) -> int:
    """Requests, of so many rows each, whose tokens are sampled together."""
    return max(1, _PART_BYTES // (4 * rows * vocab_size))


def parts_of(
    sampling_info: Any, requests: int, rows: int, vocab_size: int
) -> list[tuple[slice, Any]]:
    """A batch in parts that are sampled one after the other, to bound the memory that it takes.

    Args:
        sampling_info: SGLang's `SamplingBatchInfo` of all requests.
        rows: of the logits, a request.

    Returns:
        Of each part, its requests and their `SamplingBatchInfo`.
    """
    most = requests_at_once(rows, vocab_size)
    if requests <= most:
        return [(slice(0, requests), sampling_info)]
    names = ("temperatures", "top_ks", "top_ps", "min_ps", "sampling_seed")
    parts = []
    for start in range(0, requests, most):
        part = slice(start, min(start + most, requests))
        given = {name: getattr(sampling_info, name) for name in names}
        own = {name: x[part] for name, x in given.items() if x is not None}
        parts.append((part, dataclasses.replace(sampling_info, **own)))
    return parts


def sample_tokens(
    probs: torch.Tensor,
    sampling_info: Any,
    positions: torch.Tensor,
    width: int | torch.Tensor = 1,
) -> torch.Tensor:
    """Draw one token of each row's distribution after top-k, top-p and min-p.

    Args:
        probs: [N, V] after temperature.
        sampling_info: SGLang's `SamplingBatchInfo` of the bs requests; its seeds are honoured.
        positions: [N] int64, of the tokens whose successors are drawn: with the seed they
            say which noise a draw sees, whatever the width of the step in which it happens.
        width: rows of each request, the same for all or [bs].

    Returns:
        [N] int64 tokens; for greedy requests (top-k 1) the argmax.
    """

    def rows(per_request: torch.Tensor) -> torch.Tensor:
        return per_request.repeat_interleave(width, dim=0, output_size=len(probs))

    filters = (
        sampling_info.need_top_k_sampling
        or sampling_info.need_top_p_sampling
        or sampling_info.need_min_p_sampling
    )
    if sampling_info.sampling_seed is not None:
        # SGLang's functions number the noise by rank where something is filtered, by token where
        # nothing is, and refuse min-p: a draw would depend on what other requests ask for.
        if filters:
            limits = sampling_info.top_ks, sampling_info.top_ps, sampling_info.min_ps
            probs = _filtered(probs, *map(rows, limits))
        seeds = rows(sampling_info.sampling_seed)
        return multinomial_with_seed(torch.log(probs), seeds, positions).view(-1)
    if not filters:
        return sampling_from_probs_torch(probs).long()
    return top_k_top_p_min_p_sampling_from_probs_torch(
        probs,
        rows(sampling_info.top_ks),
        rows(sampling_info.top_ps),
        rows(sampling_info.min_ps),
        sampling_info.need_min_p_sampling,
        None,
        positions,
    ).long()


def _filtered(
    probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor
) -> torch.Tensor:
    """Zero what top-k, top-p and min-p exclude, as SGLang's function does; [n, V], limits [n]."""
    ordered, tokens = probs.sort(dim=-1, descending=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    excluded = (
        (rank >= top_ks[:, None])
        | (ordered.cumsum(-1) - ordered > top_ps[:, None])
        | (ordered < ordered[:, :1] * min_ps[:, None])
    )
    return torch.zeros_like(probs).scatter_(-1, tokens, ordered.masked_fill(excluded, 0.0))


def sample_verify_positions(
    logits: torch.Tensor,
    sampling_info: Any,
    positions: torch.Tensor,
    width: int | torch.Tensor,
) -> torch.Tensor:
    """Draw one token of the target's own sampling distribution at every verify position.

    The drafter proposes its argmax, a point mass, so speculative sampling (arXiv 2211.17192)
    reduces to: draw y_j from the target's p_j and keep the draft while it equals y_j. Draft token
    x is kept with probability p_j(x), and the first token that differs follows p_j without x. The
    drafter draws nothing, so no noise is shared between proposal and verification.

    Args:
        logits: [N, V], penalties and masks applied; not modified.
        sampling_info: SGLang's `SamplingBatchInfo` of the bs requests.
        positions: [N] int64, absolute.
        width: verify positions of each request, the same for all or [bs].

    Returns:
        [N] int64 tokens; for greedy requests (top-k 1) the argmax.
    """
    drawn = []
    requests = len(sampling_info.temperatures)
    widest = width if isinstance(width, int) else int(width.max())
    for part, info in parts_of(sampling_info, requests, widest, logits.shape[1]):
        if isinstance(width, int):
            own: int | torch.Tensor = width
            first, count = part.start * width, (part.stop - part.start) * width
        else:
            own = width[part]
            first, count = int(width[: part.start].sum()), int(own.sum())
        rows = slice(first, first + count)
        temperatures = info.temperatures.repeat_interleave(own, 0, output_size=count)
        probs = torch.softmax(logits[rows].float() / temperatures, dim=-1)
        drawn.append(sample_tokens(probs, info, positions[rows], own))
    return torch.cat(drawn)


def sample_prefill(
    original: Any, sampler: Any, probs: torch.Tensor, sampling_info: Any, positions, simple_case
):
    """Hook on the draw of SGLang's sampler: a seeded prefill draws as verification does.

    Args:
        original: `Sampler._sample_from_probs`, which refuses seeds beside FlashInfer's kernels.
        sampler: its `self`.
        probs: [bs, V]; positions: [bs].
        sampling_info: of the bs requests.
        simple_case: whether no request filters.

    Returns:
        [bs] int32 tokens, and None for a capture of the sampling mask.
    """
    if sampling_info.sampling_seed is None or sampling_info.sampling_mask_batch_indices is not None:
        return original(sampler, probs, sampling_info, positions, simple_case)
    return sample_tokens(probs, sampling_info, positions).int(), None
