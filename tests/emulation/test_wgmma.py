"""The projection by sm_90a's own units: where it runs, what it computes, what the emulator sees."""

from dataclasses import replace

import pytest
import torch
from emulated import Counters, EmulationError, Plant, emulator
from op_cases import AppendCase
from op_devices import append, append_error
from planting import expect_report

from dflare import ops

KIB = 1024
TOLERANCE = 1e-2
PROJECT = "cuda/kv_project_wgmma.cuh"
PTX = "cuda/ptx_sm90.cuh"
OUTPUT = "cuda/context_kv_output.cuh"
LAUNCH = 2  # the projection's: a stand-in for the kernel before comes first, then fuse_norm

# 18 stages in a ring of 8; 9 in one of 4, two parts of 128 tokens, which two blocks share.
FEW = AppendCase(commit_lens=(5, 0, 9), hidden=1152, layers=1)
MANY = AppendCase(rows=140, hidden=576, layers=1)
ONE_REQUEST = AppendCase(commit_lens=(9,), hidden=1152, layers=1)  # 16 tokens, no cluster
NONE = AppendCase(commit_lens=(0, 0), hidden=256, layers=1)


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLARE_WGMMA", "1")


def counted() -> Counters:
    return emulator(torch.bfloat16, 128).counters(LAUNCH)


# ---------------------------------------------------------------- where it runs


def uses_ldmatrix() -> bool:
    """Whether the portable kernel ran: only that one loads fragments."""
    append("emulated", FEW)
    return counted().matrix_loads > 0


@pytest.mark.parametrize("value", [None, "", "0"])
def test_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    assert not uses_ldmatrix()
    if value is None:
        monkeypatch.delenv("DFLARE_WGMMA")
    else:
        monkeypatch.setenv("DFLARE_WGMMA", value)
    assert uses_ldmatrix()


@pytest.mark.parametrize("capability", [8, 10, 12])
def test_other_architectures_take_the_portable_kernel(capability: int) -> None:
    emu = emulator(FEW.dtype, FEW.head_dim)
    with emu.installed(capability=capability):  # no queue: each kernel runs alone, when launched
        FEW.call(ops.append_context_kv, FEW.inputs())
    assert emu.counters(0).matrix_loads > 0


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize(
    "case",
    [
        FEW,
        MANY,
        NONE,
        replace(FEW, layers=2, kv_heads=2, bias=True, rotary=64, hidden=200),
        replace(FEW, commit_lens=(16,) * 5, hidden=64),  # two tiles of 64, the second partly valid
        replace(MANY, rows=300, hidden=136),  # two tiles of 256
    ],
    ids=str,
)
def test_writes_the_context_of_every_valid_row_and_nothing_else(case: AppendCase) -> None:
    for seed in range(3):
        assert append_error("emulated", case, seed) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 129, 257])
def test_every_instance(dtype: torch.dtype, head_dim: int, rows: int) -> None:
    case = AppendCase(rows=rows, head_dim=head_dim, rotary=head_dim, dtype=dtype, hidden=328)
    for seed in range(2):
        assert append_error("emulated", case, seed) < TOLERANCE


@pytest.mark.parametrize(
    ("rows", "sharing", "in_flight"), [(16, 1, 144), (64, 2, 192), (256, 2, 192)]
)
def test_reads_whole_sectors_and_keeps_a_ring_of_stages_in_flight(
    rows: int, sharing: int, in_flight: int
) -> None:
    """From 64 tokens on two blocks share their states: each sector is read for both."""
    append("emulated", AppendCase(rows=rows, hidden=2560, taps=9, layers=1, kv_heads=1))
    c = counted()
    blocks = 2  # K and V
    read = (blocks * 128 + blocks // sharing * rows) * 2560 * 2
    assert c.sectors * 32 == c.copied_bytes == read
    assert c.bytes_in_flight >= in_flight * KIB
    assert c.prefetched_bytes == blocks * 160 * KIB


# ---------------------------------------------------------------- bugs that are reported

FAST = {
    "the descriptor steps over eight rows": (
        FEW,
        Plant(PTX, "kEightRows = 8 * 128", "kEightRows = 16 * 128", 0),
    ),
    "the last products are not waited for": (
        FEW,
        Plant(PROJECT, "    ptx::warpgroup_wait<0>();\n", ""),
    ),
    "a stage is read before it is full": (
        FEW,
        Plant(PROJECT, "      ptx::barrier_wait(full(place.stage), place.parity);\n", ""),
    ),
    "the other phase of a stage is waited for": (
        FEW,
        Plant(PROJECT, "(empty(place.stage), place.parity)", "(empty(place.stage), !place.parity)"),
    ),
}
SLOW = {
    "the descriptor names another swizzle": (
        FEW,
        Plant(PTX, "| uint64_t{1} << 62", "| uint64_t{2} << 62", 0),
    ),
    "the descriptor steps over 16 columns": (
        FEW,
        Plant(PTX, "steps * 32 >> 4", "steps * 64 >> 4"),
    ),
    "products without a fence": (FEW, Plant(PROJECT, "      ptx::warpgroup_fence();\n", "")),
    "products of no group": (FEW, Plant(PROJECT, "      ptx::warpgroup_commit();\n", "")),
    "a stage is given back while products read it": (
        FEW,
        Plant(PROJECT, "ptx::warpgroup_wait<1>()", "ptx::warpgroup_wait<2>()"),
    ),
    "the stage that is read is given back, not the one before": (
        FEW,
        Plant(PROJECT, "release(before)", "release(place.stage)"),
    ),
    "phases do not alternate": (FEW, Plant(PROJECT, "stage = 0, parity ^= 1", "stage = 0")),
    "a stage is empty when one warp has read it": (
        FEW,
        Plant(PROJECT, "(empty(stage), kCluster * kConsumerWarps)", "(empty(stage), 1)"),
    ),
    "a stage is full with its weights": (
        FEW,
        Plant(PROJECT, "(full(stage), 2)", "(full(stage), 1)"),
    ),
    "bytes of the second part are not announced": (
        MANY,
        Plant(PROJECT, "parts * Shape::kPartBytes", "Shape::kPartBytes"),
    ),
    "the second part holds the first one's tokens": (
        MANY,
        Plant(PROJECT, "kTokens + part * kPartTokens + rank", "kTokens + rank"),
    ),
    "both warpgroups multiply the same weights": (
        FEW,
        Plant(PROJECT, "+ warpgroup * 64 * 2 * kDepth", ""),
    ),
    "one warpgroup skips a product": (
        FEW,
        Plant(PROJECT, "step < kDepth / 16", "step < kDepth / 16 - (warpgroup == 1)"),
    ),
    "one warp skips a product": (
        FEW,
        Plant(PROJECT, "step < kDepth / 16", "step < kDepth / 16 - (threadIdx.x < 32)"),
    ),
    "barriers are not announced to the copy engine": (
        FEW,
        Plant(PROJECT, "    ptx::fence_barrier_init();\n", ""),
    ),
    "no wait for fuse_norm": (FEW, Plant(PROJECT, "    ptx::wait_for_prior_kernels();\n", "")),
    "weights land after the end of a block without rows": (
        NONE,
        Plant(PROJECT, "      if (producing && first_token == 0) drain(tiles);\n", ""),
    ),
    "rows beyond the valid ones are written": (
        FEW,
        Plant(OUTPUT, "const bool valid = token < tokens;", "const bool valid = true;"),
    ),
}  # fmt: skip


# Of blocks that share their states; each emulator's report is the only one that it may be.
SHARED = {
    "a stage is empty when one block has read it": (
        (
            Plant(PROJECT, "kCluster * kConsumerWarps)", "kConsumerWarps)"),
            Plant(PROJECT, "(lane >= kCluster)", "(lane != int(blockIdx.y % kCluster))"),
        ),
        "",
    ),
    "the other block is not told": (
        (Plant(PROJECT, "(lane >= kCluster)", "(lane != int(blockIdx.y % kCluster))"),),
        "deadlock: waits for",
    ),
    "a block keeps its half": (
        (Plant(PROJECT, "(1 << kCluster) - 1", "1 << rank"),),
        "deadlock: waits for",
    ),
    "both blocks bring the same half": (
        (Plant(PROJECT, "const int rank = blockIdx.y % kCluster;", "const int rank = 0;"),),
        "",
    ),
    "only its own half is announced": (
        (Plant(PROJECT, "parts * Shape::kPartBytes", "parts * kShareBytes"),),
        "",
    ),
    "no barrier before the other block is used": (
        (Plant(PROJECT, "sync();  // the barriers are there", "__syncthreads();"),),
        "before a cluster barrier",
    ),
    "no barrier before the end of the other block": (
        (Plant(PROJECT, "sync();  // all products are done", "__syncthreads();  //"),),
        "a block ends although others have used|of a block that has ended",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", SHARED)
def test_reports_each_bug_of_shared_states(name: str) -> None:
    """Those that the emulator sees as such with every seed."""
    plants, message = SHARED[name]
    if not message:
        expect_report(lambda seed: append_error("emulated", MANY, seed, plants=plants), TOLERANCE)
        return
    for seed in range(4):
        with pytest.raises(EmulationError, match=message):
            append_error("emulated", MANY, seed, plants=plants)


def check_reported(case: AppendCase, plant: Plant) -> None:
    expect_report(lambda seed: append_error("emulated", case, seed, plants=(plant,)), TOLERANCE)


@pytest.mark.parametrize("name", FAST)
def test_reports(name: str) -> None:
    check_reported(*FAST[name])


@pytest.mark.long
@pytest.mark.parametrize("name", SLOW)
def test_reports_each_bug(name: str) -> None:
    check_reported(*SLOW[name])


@pytest.mark.long
@pytest.mark.parametrize("after", ["  // the barriers", "  // all products"])
@pytest.mark.parametrize("case", [FEW, ONE_REQUEST], ids=str)
def test_reports_the_removal_of_any_barrier(case: AppendCase, after: str) -> None:
    check_reported(case, Plant(PROJECT, "sync();" + after, after))
