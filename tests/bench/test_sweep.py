import json
from pathlib import Path

import plan
import pytest
import report
import sweep as sweep_script
from client import summarise

PLANS = sorted((Path(plan.__file__).parent / "sweeps").glob("*.yaml"))


def make_sweep(**changes):
    settings = {
        "model": "target",
        "draft": "draft",
        "arms": [
            {"name": "none", "kind": "none"},
            {"name": "width 4", "kind": "fixed"},
            {"name": "adaptive", "kind": "adaptive"},
            {"name": "ngram", "kind": "other"},
        ],
        "datasets": [{"name": "easy"}, {"name": "hard"}],
        "concurrency": [1, 8],
        "repeats": 2,
    }
    return plan.Sweep.model_validate(settings | changes)


def record(arm, concurrency=1, dataset="easy", repeat=0, rate=10.0, outputs=("a", "b"), errors=0):
    figures = {
        f"{name}_{p}_ms": 5.0
        for name in ("ttft", "tpot", "e2e_latency")
        for p in ("p50", "p90", "p99")
    }
    return figures | {
        "arm": arm,
        "dataset": dataset,
        "concurrency": concurrency,
        "repeat": repeat,
        "output_tok_s": rate,
        "accept_length": 1.5,
        "mean_width": None,
        "outputs": list(outputs),
        "errors": errors,
        "simulated": None,
    }


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_shipped_plans_are_valid_and_compare_an_adaptive_arm(path):
    sweep = plan.Sweep.load(path)
    kinds = [arm.kind for arm in sweep.arms]
    assert kinds.count("none") == kinds.count("adaptive") == 1
    assert len(plan.cells(sweep)) == len(set(plan.cells(sweep)))


@pytest.mark.parametrize("keep_alive", [True, False])
def test_every_cell_is_measured_once_and_repeats_start_with_another_arm(keep_alive):
    sweep = make_sweep(keep_alive=keep_alive)
    order = plan.cells(sweep)
    assert len(set(order)) == len(order) == 4 * 2 * 2 * 2
    first = [next(cell.arm for cell in order if cell.repeat == repeat) for repeat in (0, 1)]
    assert first == ["none", "width 4"]


def test_one_server_at_a_time_is_started_once_a_repeat():
    arms = [cell.arm for cell in plan.cells(make_sweep())]
    starts = sum(a != b for a, b in zip([None, *arms], arms, strict=False))
    assert starts == 4 * 2


def test_prompts_are_mixed_and_repeated_to_the_number_needed(tmp_path):
    dataset = plan.Dataset(name="mix", prompts=["easy", "hard"])
    flags = dataset.flags(200, 64, tmp_path)
    lines = (tmp_path / "mix.jsonl").read_text().splitlines()
    assert len(lines) >= 200
    assert all(json.loads(line)["conversations"][0]["content"] for line in lines)
    assert flags[flags.index("--num-prompts") + 1] == "200"


def test_records_survive_a_line_cut_off_by_a_crash(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps(record("none")) + "\n" + '{"arm": "none", "conc')
    assert [plan.cell_of(r).arm for r in plan.read_records(path)] == ["none"]


def verdict(sweep, records):
    return report.verdict(sweep, report.adaptive_ratios(sweep, records))


def test_the_verdict_names_the_worst_load():
    sweep = make_sweep(datasets=[{"name": "easy"}])
    records = [
        record("none", 1, rate=10),
        record("width 4", 1, rate=20),
        record("adaptive", 1, rate=21),
        record("ngram", 1, rate=100),
        record("none", 8, rate=50),
        record("width 4", 8, rate=30),
        record("adaptive", 8, rate=49),
    ]
    assert verdict(sweep, records) == "adaptive / best: worst 0.980 at concurrency 8"


def test_arms_are_compared_within_a_repeat():
    """The machine is half as fast in repeat 1; what was measured then does not count as worse."""
    sweep = make_sweep(datasets=[{"name": "easy"}])
    records = [
        record("none", rate=100, repeat=0),
        record("none", rate=50, repeat=1),
        record("adaptive", rate=55, repeat=1),
        record("none", rate=100, repeat=2),
        record("adaptive", rate=111, repeat=2),
        record("none", rate=100, repeat=3),
        record("adaptive", rate=90, repeat=3),
    ]
    assert verdict(sweep, records) == "adaptive / best: worst 1.100 at concurrency 1"


def test_without_an_adaptive_arm_there_is_no_verdict():
    records = [record("none"), record("width 4")]
    assert verdict(make_sweep(), records) == "adaptive / best: not measured"


def test_medians_are_over_repeats_and_errors_add_up():
    runs = [record("none", repeat=i, rate=r, errors=1) for i, r in enumerate((10, 30, 11))]
    figures = report.medians(runs)["easy", 1, "none"]
    assert figures["output_tok_s"] == 11
    assert figures["errors"] == 3
    assert figures["repeats"] == 3


def test_answers_that_differ_from_plain_decoding_are_counted():
    records = [record("none"), record("adaptive", outputs=("a", "x"))]
    assert report.count_differences(make_sweep(), records) == {"adaptive": (1, 2)}


def test_the_report_holds_every_arm_and_the_plots(tmp_path):
    sweep = make_sweep(datasets=[{"name": "easy"}])
    records = [record(arm.name, c) for arm in sweep.arms for c in (1, 8)]
    last = report.write_report(sweep, records, {"device": "a machine"}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.rstrip().endswith(last)
    assert text.count("| adaptive |") == 2
    assert (tmp_path / "easy.png").stat().st_size > 10_000
    assert "SIMULATED" not in text


def test_simulated_acceptance_is_labelled_everywhere(tmp_path):
    sweep = make_sweep(simulate_acc_len=4.0)
    records = [record(arm, outputs=(arm,)) for arm in ("none", "adaptive")]
    last = report.write_report(sweep, records, {}, tmp_path)
    assert "SIMULATED" in last
    text = (tmp_path / "report.md").read_text()
    assert text.index("SIMULATED") < text.index("## easy")
    assert "answers equal" not in text


def test_a_run_is_summarised_from_the_generator_and_the_servers_counters():
    details = {
        "output_throughput": 42.0,
        "total_output_tokens": 100,
        "duration": 2.0,
        "errors": ["", "timeout"],
        "generated_texts": ["x", ""],
    }
    for name in ("ttft", "tpot", "e2e_latency"):
        details |= {f"{p}_{name}_ms": 1.0 for p in ("median", "p90", "p99")}
    delta = {
        "sglang:generation_tokens_total": 110.0,
        "sglang:num_requests_total": 10.0,
        "sglang:spec_verify_calls_total": 40.0,
        "width 1": 30.0,
        "width 4": 10.0,
        "width 8": 0.0,
    }
    found = summarise(details, delta)
    assert found["errors"] == 1
    assert found["accept_length"] == 2.5
    assert found["mean_width"] == 1.75
    assert len(found["outputs"]) == 2


def test_another_plan_does_not_continue_a_sweep(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds another plan"):
        sweep_script.main(["--quick", "--out", str(tmp_path)])


def test_unknown_arms_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep_script.parse(["--quick", "--out", str(tmp_path), "--arms", "eagle"])
    assert "unknown arms ['eagle']" in capsys.readouterr().err
