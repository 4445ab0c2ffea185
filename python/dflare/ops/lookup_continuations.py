"""What followed the end of a request's text where it stood before: drafts without a drafter."""

import torch
from torch import Tensor


def lookup_continuations(
    tokens: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    anchors: Tensor,
    count: int,
    *,
    least_match: int = 3,
    longest_match: int = 64,
) -> tuple[Tensor, Tensor]:
    """Find the longest, then latest, earlier occurrence of the end of each text.

    A text is the tokens of a request's slots, then its anchor. What followed the occurrence is
    proposed to follow the anchor; where the text ends before `count` tokens, the proposal goes on
    with itself. It is prompt look-up decoding (Saxena, 2023), read through the page table.

    Args:
        tokens: [slots] int32, the token whose keys and values each slot of the pool holds.
        req_to_token: [rows, max_len] int32, slot of each index of a request.
        req_pool_indices: [bs] int64, row of `req_to_token` of each request.
        seq_lens: [bs] int64 or int32, tokens of each request before its anchor.
        anchors: [bs] int64, the last token of each request.
        count: tokens to propose, at least 1.
        least_match: shorter matches do not count; at least 1.
        longest_match: longer matches are as good as this; on CUDA at most 1024.

    Returns:
        [bs, count] int64, zeros where nothing matches, and [bs] int32, the tokens that match.

    Raises:
        RuntimeError: a shape, dtype, device, stride or (on the CPU) slot that does not fit.
    """
    return torch.ops.dflare.lookup_continuations.default(
        tokens,
        req_to_token,
        req_pool_indices,
        seq_lens,
        anchors,
        count,
        least_match,
        longest_match,
    )


@torch.library.register_fake("dflare::lookup_continuations")
def _fake(
    tokens: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    anchors: Tensor,
    count: int,
    least_match: int,
    longest_match: int,
) -> tuple[Tensor, Tensor]:
    bs = seq_lens.shape[0]
    return anchors.new_empty(bs, count), anchors.new_empty(bs, dtype=torch.int32)


def lookup_continuations_reference(
    tokens: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    anchors: Tensor,
    count: int,
    *,
    least_match: int = 3,
    longest_match: int = 64,
) -> tuple[Tensor, Tensor]:
    """`lookup_continuations` in plain Python."""
    found, lengths = [], []
    for row, prefix, anchor in zip(
        req_pool_indices.tolist(), seq_lens.tolist(), anchors.tolist(), strict=True
    ):
        text = [*tokens[req_to_token[row, :prefix].long()].tolist(), anchor]
        best, end = 0, 0
        for length in range(min(longest_match, prefix), least_match - 1, -1):
            ends = [e for e in range(length, prefix + 1) if text[e - length : e] == text[-length:]]
            if ends:
                best, end = length, ends[-1]
                break
        for _ in range(count):
            text.append(text[len(text) - (prefix + 1 - end)] if best else 0)
        found.append(text[prefix + 1 :])
        lengths.append(best)
    shape = len(lengths), count
    return anchors.new_tensor(found).view(shape), anchors.new_tensor(lengths).int()
