"""The token with the highest logit, without the logits of all tokens in memory."""

import torch
from torch import Tensor


def head_argmax(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    block_size: int = 1,
    ids: Tensor | None = None,
    first_id: int = 0,
) -> Tensor:
    """Find the first of the highest logits of each row, and write its token.

    It is `(hidden @ weight.T).argmax(-1)`, with logits rounded to the dtype as in the product. On
    CUDA up to 32 MiB of logits exist at a time (`head_argmax_columns` in csrc/cuda/heuristics.h).
    Logits that are NaN never win; a row of nothing else gets the head's first token.

    Args:
        hidden: [bs * B, H] final hidden states; bfloat16 or float16 on CUDA, bfloat16 or float32 on
            the CPU. The last dimension is contiguous.
        weight: [V, H], the head or a rank's part of it; hidden's dtype, contiguous.
        tokens: [bs * (B - 1)] int64, or [bs] where B is 1; written.
        block_size: B. Row 0 of each block is its anchor and drafts nothing; of blocks of 1 all rows
            draft.
        ids: [V] int64, ascending: the token of each row of the head. By default they follow
            `first_id`.
        first_id: token of the head's first row.

    Returns:
        Keys of the logits that won, like `tokens`: where ranks hold parts of a vocabulary,
        `token_of` gives the token of the highest of their keys.

    Raises:
        RuntimeError: a shape, dtype, device or stride that does not fit.
    """
    return torch.ops.dflare.head_argmax.default(hidden, weight, block_size, ids, first_id, tokens)


def token_of(keys: Tensor) -> Tensor:
    """The tokens of keys of `head_argmax`, int64."""
    return keys.bitwise_not().bitwise_and_(0xFFFFFFFF)


@torch.library.register_fake("dflare::head_argmax")
def _fake(
    hidden: Tensor,
    weight: Tensor,
    block_size: int,
    ids: Tensor | None,
    first_id: int,
    tokens: Tensor,
) -> Tensor:
    return torch.empty_like(tokens)


def head_argmax_reference(
    hidden: Tensor,
    weight: Tensor,
    *,
    block_size: int = 1,
    ids: Tensor | None = None,
    first_id: int = 0,
) -> Tensor:
    """The tokens that `head_argmax` writes."""
    if block_size > 1:
        hidden = hidden.unflatten(0, (-1, block_size))[:, 1:].flatten(0, 1)
    best = (hidden.float() @ weight.float().T).to(hidden.dtype).argmax(-1)
    return best + first_id if ids is None else ids[best]
