"""Parts of a request merged in a cluster: when, to which result, at what cost, what is reported."""

from dataclasses import replace

import pytest
import torch
from emulated import Counters, EmulationError, Plant, emulator
from op_cases import AttentionCase
from op_devices import attend, attention_error
from planting import barrier_removals, expect_report

from dflare import ops

TOLERANCE = 2e-2
MERGE = "cuda/attention_cluster.cuh"
ITEM = "cuda/attention_item.cuh"
LAUNCH = 2  # attention: the schedule and a stand-in for the kernel before qkv come first

CUT = AttentionCase((600,), layers=2)
RAGGED = AttentionCase((900, 40, 300, 0), block=5, heads=6)
UNEQUAL = AttentionCase((5500, 600, 700), kv_heads=1, heads=4)  # nine parts, three, three
ONE = AttentionCase((1024,), heads=4, kv_heads=1)
EIGHT = AttentionCase((4096,) * 8, heads=4, kv_heads=1)


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLARE_CLUSTER", "1")


def counted(case: AttentionCase, sm_count: int = 32) -> Counters:
    attend("emulated", case, sm_count=sm_count)
    return emulator(case.dtype, case.head_dim).counters(LAUNCH)


# ---------------------------------------------------------------- where it is taken


@pytest.mark.parametrize("value", [None, "", "0"])
def test_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    assert counted(CUT).cluster_bytes > 0
    if value is None:
        monkeypatch.delenv("DFLARE_CLUSTER")
    else:
        monkeypatch.setenv("DFLARE_CLUSTER", value)
    assert counted(CUT).cluster_bytes == 0


@pytest.mark.parametrize("capability", [8, 9, 10, 12])
def test_devices_without_clusters_and_consumer_parts_do_without(capability: int) -> None:
    emu, x = emulator(ONE.dtype, ONE.head_dim), ONE.inputs()
    with emu.installed(32, capability=capability):  # no queue: each kernel runs alone
        schedule = ONE.schedule(x, x["seq_lens"])
        ONE.call(ops.block_attention, x | {"qkv": x["qkv"][0]}, schedule=schedule)
    assert (emu.counters(0).cluster_bytes > 0) == (capability in (9, 10))


def items(lens: list[int], kv_heads: int = 8, sm_count: int = 132) -> list[list[int]]:
    """All records {request, part, parts, first partial} of a schedule at head_dim 128."""
    with emulator(torch.bfloat16, 128).installed(sm_count):
        out = ops.block_attention_schedule(torch.tensor(lens), 16, 4 * kv_heads, kv_heads, 128, -1)
    return out[4 : 4 * (1 + int(out[2]))].view(-1, 4).tolist()


@pytest.mark.parametrize("batch", range(1, 21))
def test_no_request_of_a_batch_of_equal_lengths_is_cut_into_fewer_parts(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    lens = [16384] * batch
    clustered = max(parts for _, _, parts, _ in items(lens))
    monkeypatch.delenv("DFLARE_CLUSTER")
    portable = max(parts for _, _, parts, _ in items(lens))
    assert clustered >= min(portable, 8) and (batch < 5 or clustered == portable)


def clusters_of(lens: list[int], size: int) -> dict[int, set[int]]:
    """In which clusters of items each request's parts are."""
    found: dict[int, set[int]] = {}
    for place, (request, *_) in enumerate(items(lens)):
        if request >= 0:
            found.setdefault(request, set()).add(place // size)
    return found


@pytest.mark.parametrize(
    ("lens", "size"),
    [
        ([4096] * 8, 8),  # four parts each
        ([4096] * 10, 6),  # three
        ([1024] * 5, 6),  # four: the second does not fit behind the first
        ([1024, 100, 1, 0, 1024, 700, 64, 640], 8),
    ],
)
def test_all_parts_of_a_request_are_in_one_cluster(lens: list[int], size: int) -> None:
    found = clusters_of(lens, size)
    assert list(found) == list(range(len(lens)))
    assert all(len(clusters) == 1 for clusters in found.values())


def test_requests_with_many_parts_take_all_items() -> None:
    """More than a cluster has: across clusters, with no idle item between them."""
    records = items([32768, 32768, 16384, 64, 64, 64, 64, 64])
    used = [request for request, *_ in records if request >= 0]
    assert len(used) >= 31 and used == sorted(used)


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize(
    "case",
    [
        CUT,
        RAGGED,
        UNEQUAL,
        replace(CUT, logit_scale=100.0, dtype=torch.float16),
        replace(CUT, head_dim=64, rotary=64, window=300, causal=True),
        replace(CUT, head_dim=256, rotary=64),
        AttentionCase((700,), heads=16, kv_heads=1, block=5),  # 80 rows: the 8-warp kernel
        AttentionCase((500,), heads=16, kv_heads=1, block=32),  # four tiles of rows
    ],
    ids=str,
)
def test_is_the_portable_result_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, case: AttentionCase
) -> None:
    results = [attend("emulated", case, seed, sm_count=96) for seed in range(4)]
    assert emulator(case.dtype, case.head_dim).counters(LAUNCH).cluster_bytes > 0
    monkeypatch.delenv("DFLARE_CLUSTER")
    portable = attend("emulated", case, sm_count=96)
    assert all(torch.equal(result, portable) for result in results)


def test_parts_across_two_clusters_are_merged_through_global_memory() -> None:
    c = counted(UNEQUAL)
    assert c.cluster_bytes > 0 and c.l2_bytes > 0


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("case", "sm_count", "parts"),
    [(ONE, 132 // 8, 4), pytest.param(EIGHT, 132 // 8, 4, marks=pytest.mark.slow)],
    ids=["1 x 1K", "8 x 4K"],
)
def test_nothing_crosses_global_memory(
    monkeypatch: pytest.MonkeyPatch, case: AttentionCase, sm_count: int, parts: int
) -> None:
    """One of eight KV heads, and its share of an H100. Per lane: a row's state is read by 32."""
    requests, rows, row, state = len(case.lens), 64, 128 * 4, 8
    read = requests * parts * rows * (row + 32 * state)
    written = requests * parts * rows * (row + state)
    c = counted(case, sm_count)
    assert c.l2_bytes == 0 and c.cluster_bytes == read * (parts - 1) // parts
    monkeypatch.delenv("DFLARE_CLUSTER")
    c = counted(case, sm_count)
    tickets = requests * parts * 4
    assert c.cluster_bytes == 0 and c.l2_bytes == read + written + tickets
    assert c.block_l2_bytes == (read + written // parts) // requests + 4


# ---------------------------------------------------------------- bugs that are reported

MESSAGES = {
    "before the parts are there": (
        Plant(MERGE, "ptx::cluster_barrier();  // all", "// all"),
        "before a cluster barrier",
    ),
    "before the end": (
        Plant(MERGE, "ptx::cluster_barrier_relaxed();", ""),
        "a block ends although others have used its shared memory|of a block that has ended",
    ),
}  # fmt: skip
PLANTS = {
    "reads its own part for all": Plant(ITEM, " - part + of_part;", ";"),
    "takes ranks for parts": Plant(ITEM, "% p.plan.cluster - part + of_part", "* 0 + of_part"),
    "a cluster for parts across two": Plant(ITEM, "return parts > 1 &&", "return parts > 1 ||"),
    "rows beyond the request's": Plant(MERGE, "if (first + r * step < all_rows)", "if (true)"),
    "the last part twice": Plant(MERGE, "          if (i + k >= item.parts) break;\n", ""),
    "one block is a barrier ahead": Plant(
        MERGE, "__syncthreads();", "if (item.part == 0) ptx::cluster_barrier();\n__syncthreads();"
    ),
}  # fmt: skip


def error(seed: int, *plants: Plant) -> float:
    cases = (replace(CUT, lens=(500,), layers=1), UNEQUAL)
    return max(attention_error("emulated", c, seed, sm_count=32, plants=plants) for c in cases)


@pytest.mark.parametrize("name", MESSAGES)
def test_reports_a_missing_cluster_barrier_with_every_seed(name: str) -> None:
    plant, message = MESSAGES[name]
    for seed in range(4):
        with pytest.raises(EmulationError, match=message):
            error(seed, plant)


@pytest.mark.long
@pytest.mark.parametrize("name", PLANTS)
def test_reports_each_bug(name: str) -> None:
    expect_report(lambda seed: error(seed, PLANTS[name]), TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("plant", barrier_removals(MERGE), ids=lambda plant: plant.which)
def test_reports_the_removal_of_any_barrier(plant: Plant) -> None:
    expect_report(lambda seed: error(seed, plant), TOLERANCE)


def test_reports_nothing_without_a_bug() -> None:
    assert max(error(seed) for seed in range(4)) < TOLERANCE
