"""What the kernels ask of the memories at the shapes of published drafters, counted exactly.

Counts of ldmatrix and cp.async; ordinary loads and stores are not seen.
"""

import pytest
import torch
from emulated import Counters, emulator
from op_cases import AppendCase, AttentionCase
from op_devices import append, attend

KIB = 1024
# Qwen3-4B's drafter but for the number of layers and heads, which only repeat blocks.
APPEND = {"hidden": 2560, "taps": 9, "layers": 1, "kv_heads": 1}
FUSE_NORM, PROJECT, ATTENTION = 1, 2, 2  # launches: a stand-in for the kernel before comes first


def counted(launch: int) -> Counters:
    return emulator(torch.bfloat16, 128).counters(launch)


def expect_no_conflicts(c: Counters) -> None:
    assert c.matrix_loads > 0 and c.copies > 0
    assert c.matrix_load_wavefronts == 4 * c.matrix_loads
    assert c.copy_wavefronts == 4 * c.copies


@pytest.mark.parametrize("rows", [16, 64])
def test_the_projection_reads_whole_sectors_and_no_bank_twice(rows: int) -> None:
    append("emulated", AppendCase(rows=rows, **APPEND))
    c = counted(PROJECT)
    expect_no_conflicts(c)
    blocks = 2  # K and V
    assert c.sectors * 32 == c.copied_bytes == blocks * (128 + rows) * 2560 * 2
    assert c.bytes_in_flight >= 64 * KIB
    assert c.prefetched_bytes == blocks * 160 * KIB


def test_attention_reads_its_context_once_and_no_bank_twice() -> None:
    attend("emulated", AttentionCase((512,), heads=4, kv_heads=1), sm_count=1)
    c = counted(ATTENTION)
    expect_no_conflicts(c)
    assert c.sectors * 32 == c.copied_bytes == 512 * 2 * 128 * 2
    assert c.bytes_in_flight >= 64 * KIB


def test_fuse_norm_keeps_192_kib_of_an_sm_in_flight_in_a_prompt() -> None:
    """Two blocks an SM (heuristics.h), each with its copies and what it asks into L2."""
    rows = 8
    case = AppendCase(rows=rows, **(APPEND | {"layers": 5}))  # 5 to 8 layers a block
    append("emulated", case, sm_count=1)  # two blocks at once, so far ahead is the prefetch
    c = counted(FUSE_NORM)
    token = 9 * 2560 * 2
    assert c.sectors * 32 == c.copied_bytes == rows * token
    prefetching = (rows - 2) + (rows - 4)  # tokens 2 and 4 ahead, as far as there are such
    assert c.prefetched_bytes == prefetching * token
    assert 2 * (c.bytes_in_flight + 2 * token) >= 192 * KIB
