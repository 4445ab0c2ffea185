"""The schedule kernel: every part of every request exactly once, within the space it is given."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from emulated import emulator
from hypothesis import given, settings
from hypothesis import strategies as st

from dflare import ops

EMULATOR = (torch.bfloat16, 128)
TILE = 64  # keys of a tile at head_dim 128


def tiles_of(length: int, window: int) -> int:
    return -(-min(length, window if window >= 0 else length) // TILE)


class Plan(NamedTuple):
    """What a schedule was made for, as it says itself."""

    batch: int
    units: int
    max_items: int
    max_partials: int


def schedule(
    lens: list[int],
    block: int,
    heads: int,
    kv_heads: int,
    sm_count: int,
    window: int,
    shared_kib: int = 228,
) -> tuple[list[list[int]], torch.Tensor, Plan]:
    """Items {request, part, parts, first partial} in use, the tickets, and the plan."""
    with emulator(*EMULATOR).installed(sm_count, shared_kib):
        out = ops.block_attention_schedule(torch.tensor(lens), block, heads, kv_heads, 128, window)
    plan = Plan(*out[:4].tolist())
    items, tickets = out[4:].tensor_split([4 * plan.max_items])
    return [x for x in items.view(-1, 4).tolist() if x[0] >= 0], tickets, plan


@settings(max_examples=30, deadline=None)
@given(
    lens=st.lists(
        st.integers(0, 3000) | st.integers(0, 200_000) | st.integers(-(2**63), 2**63 - 1),
        min_size=1,
        max_size=100,
    ),
    group=st.integers(1, 16),
    kv_heads=st.integers(1, 8),
    sm_count=st.integers(1, 160),
    window=st.just(-1) | st.integers(0, 5000),
)
def test_every_part_has_one_item_and_its_own_scratch(
    lens: list[int], group: int, kv_heads: int, sm_count: int, window: int
) -> None:
    """Whatever the lengths are: garbage makes a schedule of no use, never a write beyond it."""
    items, tickets, plan = schedule(lens, 16, group * kv_heads, kv_heads, sm_count, window)
    parts = {request: n for request, _, n, _ in items}
    expected = [(request, i) for request, n in sorted(parts.items()) for i in range(n)]
    assert plan.batch == len(lens) and sorted(parts) == list(range(len(lens)))
    assert [(request, part) for request, part, _, _ in items] == expected
    scratch = [first + part for _, part, n, first in items if n > 1]
    assert sorted(scratch) == list(range(len(scratch)))
    assert len(scratch) <= plan.max_partials
    assert len(tickets) == plan.max_partials * plan.units and not tickets.any()


def test_one_long_request_is_cut_to_the_square_root_of_its_tiles() -> None:
    items, _, _ = schedule([64 * TILE], 16, 8, 2, sm_count=132, window=-1)
    assert len(items) == 8


def test_a_batch_smaller_than_a_wave_fills_one_wave() -> None:
    lens = [4096] * 9
    items, _, plan = schedule(lens, 16, 32, 8, sm_count=132, window=-1)
    assert len(lens) < len(items) <= plan.max_items == 33


def test_the_shared_memory_of_an_sm_says_how_many_blocks_a_wave_has() -> None:
    """At head_dim 128 two on sm_90 and sm_100 (228 KiB), one on an A100 (docs/kernels.md)."""
    for kilobytes, blocks in ((228, 2), (164, 1), (100, 1)):
        _, _, plan = schedule([1], 16, 32, 8, 108, -1, kilobytes)
        assert plan.max_items == blocks * 108 // 8


def test_a_long_request_among_short_ones_is_cut() -> None:
    items, _, plan = schedule([32768] + [1024] * 63, 16, 32, 8, sm_count=132, window=-1)
    parts = max(n for request, _, n, _ in items if request == 0)
    block = 2.5  # tiles that a block costs
    total = tiles_of(32768, -1) + 63 * tiles_of(1024, -1) + 64 * block
    waves = plan.max_items - 64  # two
    assert (tiles_of(32768, -1) + block) / parts <= math.ceil(total / waves)


def test_a_batch_of_equal_lengths_is_not_cut_for_a_small_excess() -> None:
    """64 requests on 2 x 33 places: each is a few percent longer than its share of two waves."""
    items, _, _ = schedule([64 * TILE] * 64, 16, 32, 8, sm_count=132, window=-1)
    assert len(items) == 64


def test_the_part_with_the_block_has_fewer_tiles_of_context() -> None:
    emu = emulator(*EMULATOR)
    first = [emu.library.emu_attention_first_tile(64, part, 8) for part in range(9)]
    lengths = [end - begin for begin, end in pairwise(first)]
    assert sum(lengths) == 64 and max(lengths[:-1]) - min(lengths[:-1]) <= 1
    assert lengths[-1] in (min(lengths[:-1]) - 2, min(lengths[:-1]) - 1)


def test_a_window_is_cut_by_what_it_shows() -> None:
    cut, _, _ = schedule([32768], 16, 8, 2, sm_count=132, window=1024)
    assert len(cut) == math.isqrt(tiles_of(32768, 1024))
