"""Totals and verdicts from JSON lines."""

import pytest
import targets

PEAKS = {"peak_gb_s": 3000.0, "peak_tflop_s": 790.0}


def line(arm, us, op="block_attention", **changes):
    """A line as results.py writes it, of an attention arm on a GPU unless told otherwise."""
    shape = {"model": "qwen3-4b", "batch": 8, "context": 4096, "page": 1, "layers": 7}
    if op == "append_context_kv":
        shape = {"model": "qwen3-4b", "rows": 64, "commit_lens": "none"}
    figures = {
        "us": us,
        "plan_us": None,
        "cuda_graph": True,
        "times_floor": 1.2,
        "percent_of_bandwidth": 90.0,
        "relative_error": None,
    }
    run = {"time": "now", "command": "python", "dtype": "bfloat16", "device": "cuda"}
    return {"op": op, "arm": arm} | shape | figures | run | PEAKS | changes


ATTENTION = [
    line("dflare", 40.0),
    line("schedule", 7.0),
    line("prologue", 10.0),
    line("fa3", 60.0),
    line("flashinfer_fa2", 50.0, plan_us=70.0),
]


def by_target(lines):
    return {verdict.target.split(":")[0]: verdict for verdict in targets.verdicts(lines)}


def test_a_layer_takes_prologue_and_its_share_of_schedule_or_plan():
    times = targets.layer_times({x["arm"]: x for x in ATTENTION})
    assert {name: time.total for name, time in times.items()} == pytest.approx(
        {"dflare": 41.0, "fa3": 70.0, "flashinfer_fa2": 70.0}
    )
    without_prologue = targets.layer_times({x["arm"]: x for x in ATTENTION if x["us"] != 10.0})
    assert set(without_prologue) == {"dflare"}


def test_small_batches_are_held_against_the_best_library_with_all_that_it_needs():
    verdict = by_target(ATTENTION)["op 2, batch 1..8, context 1K..4K"]
    assert verdict.value == pytest.approx(70 / 41) and verdict.met is True
    assert "without flashinfer_fa3, flashinfer_uniform" in verdict.why
    faster = [*ATTENTION, line("flashinfer_fa3", 48.0)]
    assert by_target(faster)["op 2, batch 1..8, context 1K..4K"].met is False


def test_nothing_is_decided_without_a_baseline_or_without_graphs():
    alone = [x for x in ATTENTION if x["arm"] in ("dflare", "schedule", "prologue")]
    ungraphed = [x | {"cuda_graph": x["arm"] == "dflare"} for x in ATTENTION]
    for lines in (alone, ungraphed):
        verdict = by_target(lines)["op 2, batch 1..8, context 1K..4K"]
        assert verdict.met is None and verdict.why


def test_large_batches_are_held_against_bandwidth_and_every_baseline():
    large = [x | {"batch": 32} for x in [*ATTENTION, line("eager", 40.5)]]
    bandwidth, baseline = targets.verdicts(large)
    assert (bandwidth.value, bandwidth.met) == (90.0, True)
    assert baseline.value == pytest.approx(40.5 / 41) and baseline.met is False


@pytest.mark.parametrize("rows, met", [(256, [False, True]), (512, []), (1024, [True])])
def test_context_writes_are_held_against_floor_dspark_and_gemm(rows, met):
    arms = [("dflare", 40.0, 1.6), ("dspark", 90.0, 3.0), ("bmm", 33.0, None)]
    lines = [
        line(arm, us, "append_context_kv", rows=rows, times_floor=floor) for arm, us, floor in arms
    ]
    assert [verdict.met for verdict in targets.verdicts(lines)] == met


def test_runs_are_not_mixed():
    earlier = [x | {"time": "before", "us": x["us"] / 10} for x in ATTENTION if x["arm"] == "fa3"]
    found = targets.verdicts([*earlier, *ATTENTION])
    assert [verdict.met for verdict in found] == [None, True]


def test_an_arm_that_failed_counts_as_not_measured():
    failed = {name: line("dspark", 0, "append_context_kv")[name] for name in ("op", "arm")}
    shape = line("dflare", 1.0, "append_context_kv")
    failed = shape | failed | {"failure": "ModuleNotFoundError"}
    verdict = by_target([shape, failed])
    assert targets.verdicts([shape, failed])[1].why == "dspark not measured"
    assert verdict["op 1, N 16..256"].met is None


def test_accuracy_is_held_against_the_limit_and_against_pytorch():
    lines = [line("dflare", 1.0, relative_error=3e-3), line("eager", 2.0, relative_error=1e-3)]
    limit, over_eager = [v for v in targets.verdicts(lines) if v.target.startswith("error")]
    assert limit.met is True and over_eager.met is False
    assert targets.inaccurate({"dflare": 3e-3, "eager": 1e-3}, "bfloat16")
    assert not targets.inaccurate({"dflare": 1e-3, "eager": 1e-3, "bmm": None}, "bfloat16")
    assert targets.inaccurate({"fa3": float("nan")}, "bfloat16")


def test_the_summary_names_what_was_missed_and_what_is_missing():
    missed = [line("dflare", 40.0, "append_context_kv", times_floor=1.7)]
    rows = {
        target: (verdict, detail)
        for target, verdict, detail in targets.summary(targets.verdicts(missed))
    }
    verdict, detail = rows["op 1, N 16..256: at most 1.5 x floor"]
    assert verdict == "missed" and "1.7 at model qwen3-4b" in detail
    verdict, detail = rows["op 1, N 16..256: 2 x faster than DSpark's way"]
    assert verdict == "undecided" and "dspark not measured" in detail
    partial = targets.summary(targets.verdicts(ATTENTION))
    assert partial[0][1] == "met against what was measured"
