"""Who sees whom when many blocks of one sequence are trained in one forward pass.

Keys are laid out as ``[context 0 .. S-1 | block 0 | block 1 | ...]``, queries as
``[block 0 | block 1 | ...]``, each block having B slots. A slot of the block anchored at n0 sees

* context K/V at indices < n0 (what the engine has written when it drafts that block), and
* every slot of its own block, before and after it: the block is not causal,

In a sliding layer it sees only keys at least as far on as its own index minus the window, and the
block is causal too, which is how SGLang runs such layers (`_get_dflash_layer_attention_params` in
sglang/srt/models/dflash.py).
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

_compiled_create_block_mask = torch.compile(create_block_mask)


def dense_block_mask(
    anchors: Tensor, context_len: int, block_size: int, window: int = -1
) -> Tensor:
    """Build the mask as a tensor, for scaled-dot-product attention.

    Args:
        anchors: ``[N, A]`` int64, index of each block's slot 0; 0 for a block that is padding.
        context_len: S, context positions a sequence.
        block_size: B.
        window: Of a sliding layer, the largest distance from a slot back to a visible key; -1 for
            a full layer (as the attention ops have it).

    Returns:
        ``[N, 1, A*B, S + A*B]`` bool, true where the query sees the key.
    """
    rows, blocks = anchors.shape
    slot = torch.arange(block_size, device=anchors.device)
    index = (anchors[:, :, None] + slot).view(rows, blocks * block_size)
    block = torch.arange(blocks, device=anchors.device).repeat_interleave(block_size)
    anchor = anchors.repeat_interleave(block_size, dim=1)
    context = torch.arange(context_len, device=anchors.device)
    sees_context = context < anchor[:, :, None]
    sees_block = (block[:, None] == block).expand(rows, -1, -1)
    if window >= 0:
        sees_context = sees_context & (context >= index[:, :, None] - window)
        distance = index[:, :, None] - index[:, None, :]
        sees_block = sees_block & (distance >= 0) & (distance <= window)
    return torch.cat([sees_context, sees_block], dim=-1)[:, None]


def flex_block_mask(
    anchors: Tensor, context_len: int, block_size: int, window: int = -1
) -> BlockMask:
    """Build the same mask for flex attention, which skips tiles that nobody sees.

    Sorted anchors make the skipping effective: neighbouring blocks then see similar contexts.

    Args:
        anchors: ``[N, A]`` int64, ascending in each row.
        context_len: S.
        block_size: B.
        window: As in :func:`dense_block_mask`.

    Returns:
        A mask for queries of length ``A*B`` and keys of length ``S + A*B``.
    """
    rows, blocks = anchors.shape
    queries = blocks * block_size

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        anchor = anchors[row, query // block_size]
        # Context keys give a negative slot number here; the clamp only keeps the lookup in range.
        key_slot = (key - context_len).clamp(min=0)
        sees_context = (key < context_len) & (key < anchor)
        sees_block = (key >= context_len) & (key_slot // block_size == query // block_size)
        if window < 0:
            return sees_context | sees_block
        slot, key_slot = query % block_size, key_slot % block_size
        in_context = key >= anchor + slot - window
        in_block = (key_slot <= slot) & (key_slot >= slot - window)
        return (sees_context & in_context) | (sees_block & in_block)

    # Uncompiled, the mask is first made densely, which for long sequences is gigabytes.
    create = _compiled_create_block_mask if anchors.is_cuda else create_block_mask
    return create(
        visible,
        B=rows,
        H=None,
        Q_LEN=queries,
        KV_LEN=context_len + queries,
        device=str(anchors.device),
    )
