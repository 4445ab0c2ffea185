"""The emulator reports bugs: each test plants one in a copy of a kernel and expects a failure."""

import pytest
from emulated import Plant
from op_cases import AppendCase, AttentionCase
from op_devices import GEMM, append_error, attention_error
from planting import barrier_removals, expect_report

TOLERANCE = 2e-2
ATTENTION = "cuda/block_attention.cuh"
TILE = "cuda/attention_tile.cuh"
MERGE = "cuda/attention_merge.cuh"
OUTPUT = "cuda/context_kv_output.cuh"
PROJECT = "cuda/kv_project_write.cuh"
FUSE = "cuda/fuse_norm.cu"
WRITE = "cuda/norm_rope_write.cu"
REQUEST = "  queries.request_heads(item, 0, query_source);\n"
WAIT = "  ptx::wait_for_prior_kernels();\n"

CUT = AttentionCase((600,), layers=2)  # three parts on a large GPU
RAGGED = AttentionCase((70, 3), block=5)
APPEND = AppendCase(commit_lens=(5, 0, 9), hidden=576)
LARGE_APPEND = AppendCase(rows=70, hidden=576)


FAST = {
    "attention: removed barrier before a stage is refilled": (
        CUT,
        Plant(ATTENTION, "__syncthreads();  // the tile is complete, and", "// "),
    ),
    "attention: wrong wait count, one group too few": (
        CUT,
        Plant(ATTENTION, "ptx::cp_async_wait<kStages - 2>()", "ptx::cp_async_wait<kStages - 1>()"),
    ),
    "attention: unmasked tail": (
        RAGGED,
        Plant(TILE, "if (key < first || key > last)", "if (key < first)"),
    ),
    "attention: off-by-one page, the slot of the next context index": (
        RAGGED,
        Plant(ATTENTION, "? item.slots[key] : -1", "? item.slots[key + 1] : -1"),
    ),
    "project: no barrier before a stage is refilled": (
        APPEND,
        Plant(PROJECT, "__syncthreads();  // the stage has arrived", "// "),
    ),
}

SLOW = {
    "attention: slots beyond the context": (
        RAGGED,
        Plant(ATTENTION, "tile < item.tiles && key < item.seq_len ?", "tile < item.tiles ?"),
    ),
    "attention: window one key too wide": (
        AttentionCase((200,), window=9, logit_scale=0.25),
        Plant(TILE, "? query_index - p.window : INT_MIN", "? query_index - p.window - 1 : 0"),
    ),
    "attention: no wait for the kernels before": (
        CUT,
        Plant(ATTENTION, WAIT + REQUEST, REQUEST),
    ),
    "fuse: no wait for the kernel before": (
        APPEND,
        Plant(FUSE, "  ptx::wait_for_prior_kernels();\n", ""),
    ),
    "launch: kernels that want different splits of an SM's memory": (
        APPEND,
        Plant("cuda/launch.cuh", "= cudaSharedmemCarveoutMaxShared", "= shared_bytes > 4096"),
    ),
    "attention: the block's heads read before the wait": (
        CUT,
        Plant(
            ATTENTION,
            WAIT + REQUEST,
            REQUEST + WAIT,
        ),
    ),
    "attention: dependents start before the context has been read": (
        CUT,
        Plant(
            ATTENTION,
            REQUEST,
            "  ptx::launch_dependents();\n" + REQUEST,
        ),
    ),
    "attention: idle blocks do not wait": (
        CUT,
        Plant(ATTENTION, "    ptx::wait_for_prior_kernels();\n    return;", "    return;"),
    ),
    "attention: ticket left drawn": (CUT, Plant(MERGE, "if (last) *ticket = 0;", "")),
    "attention: merges before the last part has arrived": (
        CUT,
        Plant(MERGE, "(ticket, 1) == item.parts - 1", "(ticket, 1) == item.parts - 2"),
    ),
    "attention: merges parts without their weight": (
        CUT,
        Plant(MERGE, "weight = ptx::exp2(state.x - offset);", "weight = 1;"),
    ),
    "attention: rows beyond the group are written": (
        RAGGED,
        Plant(MERGE, "      if (row >= item.rows()) continue;\n", ""),
    ),
    "project: waits for one group too few": (
        APPEND,
        Plant(PROJECT, "ptx::cp_async_wait<kStages - 2>()", "ptx::cp_async_wait<kStages - 1>()"),
    ),
    "project: no wait for fuse_norm": (
        APPEND,
        Plant(PROJECT, "    ptx::wait_for_prior_kernels();\n", ""),
    ),
    "project: rows counted before the wait": (
        APPEND,
        Plant(
            PROJECT,
            "    ptx::wait_for_prior_kernels();\n    const int tokens ="
            " min(valid_rows(p.out) - first_token, kTokens);\n",
            "    const int tokens = min(valid_rows(p.out) - first_token, kTokens);\n"
            "    ptx::wait_for_prior_kernels();\n",
        ),
    ),
    "project: rows beyond the valid ones are written": (
        APPEND,
        Plant(OUTPUT, "const bool valid = token < tokens;", "const bool valid = true;"),
    ),
    "project: reads tokens beyond the tensor": (
        LARGE_APPEND,
        Plant(PROJECT, "i * kRowStep < rows_left", "valid"),
    ),
    "project: only the first depth warp's sums": (
        APPEND,
        Plant(PROJECT, "d < Shape::kDepthWarps", "d < 1"),
    ),
    "write: heads beyond the valid rows are written": (
        APPEND,
        Plant(WRITE, "rows[i], task < tasks);", "rows[i], true);"),
    ),
    "fuse: counts its own block twice": (
        APPEND,
        Plant(FUSE, "(p.commit_lens, request, ", "(p.commit_lens, request + 1, "),
    ),
}  # fmt: skip


def error(case: AttentionCase | AppendCase, seed: int, *plants: Plant) -> float:
    if isinstance(case, AttentionCase):
        return attention_error("emulated", case, seed, plants=plants, sm_count=32)
    ways = (plants, (*plants, GEMM))
    return max(append_error("emulated", case, seed, plants=way) for way in ways)


def check_reported(case: AttentionCase | AppendCase, plant: Plant) -> None:
    expect_report(lambda seed: error(case, seed, plant), TOLERANCE)


@pytest.mark.parametrize("name", FAST)
def test_reports(name: str) -> None:
    check_reported(*FAST[name])


def barriers(file: str, case: AttentionCase | AppendCase) -> list[tuple]:
    return [(case, plant) for plant in barrier_removals(file)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "plant"),
    [
        *barriers(ATTENTION, CUT),
        *barriers(MERGE, CUT),
        *barriers(PROJECT, APPEND),
        *barriers(FUSE, APPEND),
    ],
    ids=lambda value: f"{value.file}-{value.which}" if isinstance(value, Plant) else "",
)
def test_reports_the_removal_of_any_barrier(case: AttentionCase | AppendCase, plant: Plant) -> None:
    check_reported(case, plant)


@pytest.mark.long
@pytest.mark.parametrize("name", SLOW)
def test_reports_each_bug(name: str) -> None:
    check_reported(*SLOW[name])


@pytest.mark.parametrize("case", [CUT, RAGGED, APPEND, LARGE_APPEND], ids=str)
def test_reports_nothing_without_a_bug(case: AttentionCase | AppendCase) -> None:
    for seed in range(5):
        assert error(case, seed) < TOLERANCE
