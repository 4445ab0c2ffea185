"""The block mask, held against the rule slot by slot and against flex attention's form of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflare.training.drafter.block_mask import dense_block_mask, flex_block_mask


def rule(anchors, context_len, block_size, window):
    """Who sees whom, spelled out."""
    queries = len(anchors) * block_size
    mask = torch.zeros(queries, context_len + queries, dtype=torch.bool)
    for query in range(queries):
        index = anchors[query // block_size] + query % block_size
        for key in range(context_len + queries):
            if key < context_len:
                key_index, seen = key, key < anchors[query // block_size]
            else:
                block, slot = divmod(key - context_len, block_size)
                key_index, seen = anchors[block] + slot, block == query // block_size
            near = window < 0 or index - window <= key_index <= index
            mask[query, key] = seen and near
    return mask


@settings(deadline=None, max_examples=40)
@given(
    context_len=st.integers(1, 12),
    block_size=st.integers(1, 5),
    window=st.integers(-1, 8),
    data=st.data(),
)
def test_dense_and_flex_masks_follow_the_rule(context_len, block_size, window, data):
    row = st.lists(st.integers(0, context_len), min_size=3, max_size=3).map(sorted)
    anchors = data.draw(st.lists(row, min_size=2, max_size=2))
    expected = torch.stack([rule(a, context_len, block_size, window) for a in anchors])[:, None]
    tensor = torch.tensor(anchors)

    dense = dense_block_mask(tensor, context_len, block_size, window)
    assert torch.equal(dense, expected)

    mask_mod = flex_block_mask(tensor, context_len, block_size, window).mask_mod
    rows, _, queries, keys = expected.shape
    grid = torch.meshgrid(
        torch.arange(rows), torch.arange(queries), torch.arange(keys), indexing="ij"
    )
    assert torch.equal(mask_mod(grid[0], torch.zeros(1), grid[1], grid[2]), expected[:, 0])


@pytest.mark.parametrize("window", [-1, 0, 3])
def test_every_slot_sees_at_least_itself(window):
    mask = dense_block_mask(torch.tensor([[0, 0, 5]]), context_len=6, block_size=4, window=window)
    slots = torch.arange(12)
    assert mask[0, 0, slots, 6 + slots].all()
