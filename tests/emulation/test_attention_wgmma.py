"""Attention of wide groups by sm_90a's own products: where, to which result, what is reported."""

from dataclasses import replace

import pytest
import torch
from emulated import Plant, emulator
from op_cases import AttentionCase
from op_devices import attend, attention_error
from planting import expect_report

from dflare import ops

TOLERANCE = 2e-2
TILE = "cuda/attention_wgmma_tile.cuh"
PTX = "cuda/ptx_sm90.cuh"
LAUNCH = 2  # attention: the schedule and a stand-in for the kernel before qkv come first

WIDE = AttentionCase((330,), block=5, heads=16, kv_heads=1)  # 80 rows, six tiles in parts


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLARE_WGMMA", "1")


def matrix_loads() -> int:
    return emulator(torch.bfloat16, 128).counters(LAUNCH).matrix_loads


def portable_loads(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Fragments that a call loads where warpgroups are asked for, and where they are not."""
    attend("emulated", case)
    asked = matrix_loads()
    with monkeypatch.context() as without:
        without.delenv("DFLARE_WGMMA")
        attend("emulated", case)
    return asked, matrix_loads()


def test_only_queries_are_loaded_as_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, portable = portable_loads(replace(WIDE, lens=(20,)), monkeypatch)
    assert asked == 8 * 8  # of eight warps, one request's part
    assert portable > asked


def test_narrow_groups_take_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, portable = portable_loads(replace(WIDE, lens=(20,), heads=12), monkeypatch)
    assert asked == portable


@pytest.mark.parametrize("capability", [8, 10, 12])
def test_other_architectures_take_the_portable_kernel(capability: int) -> None:
    case = replace(WIDE, lens=(20,))
    emu, x = emulator(case.dtype, case.head_dim), case.inputs()
    with emu.installed(32, capability=capability):  # no queue: each kernel runs alone
        schedule = case.schedule(x, x["seq_lens"])
        case.call(ops.block_attention, x | {"qkv": x["qkv"][0]}, schedule=schedule)
    assert emu.counters(0).matrix_loads > 8 * 8


@pytest.mark.parametrize(
    "case",
    [
        WIDE,
        replace(WIDE, lens=(90, 0, 200), block=8, page=16, rotary=64, layers=2),  # 128 rows
        replace(WIDE, lens=(230,), block=10, window=100, causal=True),  # two tiles of rows
        replace(WIDE, logit_scale=100.0, dtype=torch.float16),
    ],
    ids=str,
)
def test_attends_as_the_reference(case: AttentionCase) -> None:
    for seed in range(2):
        assert attention_error("emulated", case, seed, sm_count=32) < TOLERANCE


def test_is_merged_in_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLARE_CLUSTER", "1")
    assert attention_error("emulated", WIDE, sm_count=96) < TOLERANCE
    assert emulator(WIDE.dtype, 128).counters(LAUNCH).cluster_bytes > 0


# ---------------------------------------------------------------- bugs that are reported

FAST = {
    "copies are not published": Plant(TILE, "{ ptx::publish_to_products(); }", "{}"),
    "values are read while the next tile overwrites them": Plant(
        TILE, "    ptx::warpgroup_wait<0>();\n    settle(sum);", "    settle(sum);"
    ),
}
LONG = {
    "scores are not waited for": Plant(
        TILE, "    ptx::warpgroup_wait<0>();\n    settle(score);", "    settle(score);"
    ),
    "the second panel of keys is the first": Plant(TILE, "tile + k / 4 * kPanelBytes", "tile"),
    "panels of values lie closer": Plant(
        TILE, "panels_descriptor(values, kPanelBytes)", "panels_descriptor(values, kPanelBytes / 2)"
    ),
    "values of the same 16 keys": Plant(TILE, " + k * 16 * kLineBytes", ""),
    "rows are kept whole": Plant(TILE, "panel_offset<kKeys>(row", "tile_offset<kHeadDim>(row"),
    "a warp without rows does not multiply": Plant(TILE, "warp / 4 * 64", "warp * 16"),
    "products without a fence": Plant(TILE, "    ptx::warpgroup_fence();\n", "", 1),
    "eight rows of a panel lie further apart": Plant(
        PTX, "kEightRows = 8 * 128", "kEightRows = 16 * 128", 1
    ),
}  # fmt: skip


def check_reported(plant: Plant) -> None:
    def error(seed: int) -> float:
        return attention_error("emulated", WIDE, seed, sm_count=32, plants=(plant,))

    expect_report(error, TOLERANCE)


@pytest.mark.parametrize("name", FAST)
def test_reports(name: str) -> None:
    check_reported(FAST[name])


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_reports_each_bug(name: str) -> None:
    check_reported(LONG[name])
