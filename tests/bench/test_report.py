import pytest
from bench.serving import plan, report
from bench.serving import sweep as sweep_script
from sweep_cells import make_sweep, record


def verdict(sweep, records):
    return report.verdict(sweep, records).removesuffix(
        f" (INCOMPLETE: {len(report.missing_cells(sweep, records))} cells failed, had errors or "
        "were not measured)"
    )


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


def test_the_verdict_is_the_ratio_of_medians_over_the_repeats_that_have_both():
    """The machine is half as fast in repeat 1; repeat 0 lacks the adaptive arm."""
    sweep = make_sweep(datasets=[{"name": "easy"}])
    records = [
        record("none", rate=300, repeat=0),
        record("none", rate=50, repeat=1),
        record("adaptive", rate=55, repeat=1),
        record("none", rate=100, repeat=2),
        record("adaptive", rate=111, repeat=2),
        record("none", rate=120, repeat=3),
        record("adaptive", rate=90, repeat=3),
    ]
    assert verdict(sweep, records) == "adaptive / best: worst 0.900 at concurrency 1"
    ratio = report.adaptive_ratios(sweep, records).loc["easy", 1, "none"]
    assert list(ratio)[1:] == [1.1, 0.75, 1.11]  # median, least, greatest


def test_a_second_arm_without_speculation_is_noise_and_no_rival(tmp_path):
    arms = [
        {"name": name, "kind": kind}
        for name, kind in (("none", "none"), ("adaptive", "adaptive"), ("again", "none"))
    ]
    sweep = make_sweep(arms=arms, datasets=[{"name": "easy"}], concurrency=[1], repeats=2)
    records = [
        record(arm, rate=rate, repeat=repeat)
        for repeat, rates in enumerate(((100, 99, 110), (80, 79, 72)))
        for arm, rate in zip(("none", "adaptive", "again"), rates, strict=True)
    ]
    last = report.write_report(sweep, records, {}, "a command", tmp_path)
    assert last == "adaptive / best: worst 0.989 at concurrency 1"
    text = (tmp_path / "report.md").read_text()
    assert "| easy | 1 | again | 1.011 | 1.000 (0.900 to 1.100) |" in text
    assert "Within the repeats the worst is 0.989 (0.988 to 0.990) against none" in text


@pytest.mark.parametrize(
    "broken",
    [
        {"errors": 1},
        {"failed": "DFlareError: gone"},
        None,
    ],
    ids=["errors", "failed", "not measured"],
)
def test_a_verdict_without_all_rivals_says_so(broken):
    sweep = make_sweep(datasets=[{"name": "easy"}], concurrency=[1], repeats=1)
    records = [record(arm) for arm in ("none", "adaptive")]
    if broken:
        records.append(record("width 4") | broken)
    assert report.verdict(sweep, records).endswith(
        "(INCOMPLETE: 1 cells failed, had errors or were not measured)"
    )
    assert "INCOMPLETE" not in report.verdict(sweep, [*records, record("width 4")])


def test_without_an_adaptive_arm_there_is_no_verdict():
    records = [record("none"), record("width 4")]
    assert verdict(make_sweep(), records) == "adaptive / best: not measured"


def test_medians_are_over_repeats_and_errors_add_up():
    runs = [record("none", repeat=i, rate=r, errors=1) for i, r in enumerate((10, 30, 11))]
    figures = report.medians(runs).loc["easy", 1, "none"]
    assert figures["output_tok_s"] == 11
    assert figures["errors"] == 3
    assert figures["repeats"] == 3


def test_answers_that_differ_from_plain_decoding_are_counted():
    records = [record("none"), record("adaptive", outputs=("a", "x"))]
    assert report.count_differences(make_sweep(), records) == {"adaptive": (1, 2)}


def test_the_report_holds_every_arm_and_the_plots(tmp_path):
    sweep = make_sweep(datasets=[{"name": "easy"}])
    records = [record(arm.name, c) for arm in sweep.arms for c in (1, 8)]
    last = report.write_report(sweep, records, {}, "a command", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.rstrip().endswith(last)
    assert "- command: a command\n- device: a machine\n" in text
    assert "do not belong together" not in text and "What failed" not in text
    assert text.count("| adaptive |") == 2
    assert (tmp_path / "easy.png").stat().st_size > 10_000
    assert "SIMULATED" not in text


def test_simulated_acceptance_is_labelled_everywhere(tmp_path):
    sweep = make_sweep(simulate_acc_len=4.0)
    records = [record(arm, outputs=(arm,)) for arm in ("none", "adaptive")]
    last = report.write_report(sweep, records, {}, "a command", tmp_path)
    assert "SIMULATED" in last
    cell = plan.cell_of(records[0])
    assert "SIMULATED" in sweep_script._line(cell, records[0] | {"simulated": 4.0})
    assert "SIMULATED" not in sweep_script._line(cell, records[0])
    text = (tmp_path / "report.md").read_text()
    assert text.index("SIMULATED") < text.index("## easy")
    assert "answers equal" not in text


def test_the_report_names_what_failed_and_cells_that_do_not_belong_together(tmp_path):
    sweep = make_sweep()
    records = [record("none"), record("adaptive") | {"made_with": {"revision": "def"}}]
    records.append(plan.cell_of(record("width 4")).model_dump())
    records[-1] |= {"failed": "out of memory", "made_with": {"revision": "def"}}
    report.write_report(sweep, records, {"ngram": "does not start: no GPU"}, "", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "- ngram: does not start: no GPU" in text
    assert "- width 4, easy, concurrency 1, repeat 0: out of memory" in text
    assert "do not belong together" in text and "- 2 cells: revision: def" in text
