"""Sampling the target's token at every verify position, for devices without SGLang's kernels."""

import torch
from sglang.srt.layers.sampler import (
    sampling_from_probs_torch,
    top_k_top_p_min_p_sampling_from_probs_torch,
)


def sample_verify_positions(
    logits: torch.Tensor, sampling_info, positions: torch.Tensor, width: int
) -> torch.Tensor:
    """Draw one token of the target's own sampling distribution at every verify position.

    The drafter proposes its argmax, a point mass, so speculative sampling (arXiv 2211.17192)
    reduces to: draw y_j from the target's p_j and keep the draft while it equals y_j. Draft token
    x is kept with probability p_j(x), and the first token that differs follows p_j without x.

    Args:
        logits: [bs * width, V], penalties and masks applied; not modified.
        sampling_info: SGLang's `SamplingBatchInfo` of the bs requests.
        positions: [bs * width] int64, for seeded sampling.
        width: verify positions a request.

    Returns:
        [bs * width] int64 tokens; for greedy requests (top-k 1) the argmax.
    """

    def rows(per_request: torch.Tensor) -> torch.Tensor:
        return per_request.repeat_interleave(width, dim=0)

    probs = torch.softmax(logits.float() / rows(sampling_info.temperatures), dim=-1)
    seed = sampling_info.sampling_seed
    seed = None if seed is None else rows(seed)
    filtered = (
        sampling_info.need_top_p_sampling
        or sampling_info.need_top_k_sampling
        or sampling_info.need_min_p_sampling
    )
    if filtered:
        sampled = top_k_top_p_min_p_sampling_from_probs_torch(
            probs,
            rows(sampling_info.top_ks),
            rows(sampling_info.top_ps),
            rows(sampling_info.min_ps),
            sampling_info.need_min_p_sampling,
            seed,
            positions,
        )
    else:
        sampled = sampling_from_probs_torch(probs, seed, positions)
    return sampled.long()
