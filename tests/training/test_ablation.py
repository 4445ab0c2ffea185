"""The grid that compares architectures and objectives: equal sizes, resumed, never mixed."""

import json
import sys
from pathlib import Path

import pytest
from checkpoints import write_random_target
from tiny_models import train_config, write_data

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "training"))

import ablation
from ablation_report import write_report

from dflare.training.errors import ConfigError
from dflare.training.run.trainer import Trainer

GRID = [
    ablation.Variant("DFlash", "decay, gamma 2.5", 0),
    ablation.Variant("DFlare, shared K/V", "D-PACE", 0),
    ablation.Variant("DFlare", "D-PACE", 0),
]


@pytest.fixture
def folder(tmp_path):
    write_random_target(tmp_path / "target", num_layers=4)
    write_data(tmp_path / "data.xz", 14, vocab_size=512)
    return tmp_path


def config(folder: Path, **changes):
    settings = {"target__name": str(folder / "target"), "run__steps": 2}
    return train_config(folder, **{**settings, "objective__soft_labels": 0.5, **changes})


def run(folder: Path, grid, new_tokens: int = 6, **changes) -> list[dict]:
    output = folder / "ablation"
    ablation.run_grid(config(folder, **changes), grid, output, None, new_tokens, 4)
    return ablation.read_results(output)


def test_variants_have_as_many_parameters_as_the_configuration(folder):
    own = config(folder, drafter__intermediate_size=96)
    target = Trainer.load_target(own)
    budget = ablation.parameters(own.drafter, target)
    for architecture in ablation.ARCHITECTURES:
        section = ablation.sized(own, architecture, target)
        wider = section.model_copy(update={"intermediate_size": section.intermediate_size + 16})
        step = ablation.parameters(wider, target) - ablation.parameters(section, target)
        assert abs(ablation.parameters(section, target) - budget) <= step / 2


@pytest.mark.slow
def test_a_grid_goes_on_with_what_is_missing(folder, monkeypatch):
    first = run(folder, GRID[:1])
    trained = []
    real = ablation.run_variant

    def counted(config, variant, *rest):
        trained.append(variant)
        return real(config, variant, *rest)

    monkeypatch.setattr(ablation, "run_variant", counted)
    results = run(folder, GRID)
    assert trained == GRID[1:]
    assert results[:1] == first and [result["variant"] for result in results] == [
        variant.key() for variant in GRID
    ]
    assert max(r["parameters"] for r in results) < 1.1 * min(r["parameters"] for r in results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"run__steps": 3}, r"run\.steps \(was 2, is 3\)"),
        ({"objective__soft_labels": 0.0}, r"objective\.soft_labels \(was 0\.5, is 0\.0\)"),
        ({"new_tokens": 7}, r"new_tokens \(was 6, is 7\)"),
        ({"data": "other"}, r"corpus \("),
    ],
)
def test_runs_under_other_conditions_are_not_mixed(folder, changes, named):
    run(folder, GRID[:1])
    before = (folder / "ablation/results.jsonl").read_bytes()
    if changes.pop("data", None):
        write_data(folder / "data.xz", 14, seed=1, vocab_size=512)
    with pytest.raises(ConfigError, match=named):
        run(folder, GRID, **changes)
    assert (folder / "ablation/results.jsonl").read_bytes() == before


def test_the_report_says_under_which_conditions_the_runs_were_made(tmp_path):
    conditions = ablation.conditions(
        config(tmp_path, objective__frequent=40, objective__random=5), "cpu", "c0ffee", 96
    )
    results = [
        {
            "variant": ["DFlash", "decay, gamma 2.5", seed],
            "parameters": 2_000_000,
            "accept_length": 1.4 + 0.2 * seed,
            "reached": [0.4, 0.1],
            "prompt_lookup": 1.3,
            "teacher_forced": 1.6,
            "prompts": 4,
            "minutes": 2.0,
            "sequences": 10,
            "tokens": 200,
            "hardware": "a processor",
            "torch": "2.11",
            "conditions": conditions,
            "command": f"python ablation.py tiny.yaml --seeds {1 + seed}",
        }
        for seed in range(2)
    ]
    (tmp_path / "results.md").write_text("before\n<!-- ablation -->\nold\n<!-- /ablation -->\nend")
    write_report(results, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nend") and "old" not in text
    assert "| DFlash | decay, gamma 2.5 | 2.00M | 2 | **1.500** (1.400 .. 1.600) |" in text
    for fact in (
        "decay, gamma 2.5: gamma 2.5, fixed",
        "D-PACE: alpha 0.5",
        "soft labels 0.5",
        "products in float32",
        "40 frequent and 5 random",
        "2 runs of 2 steps on 10 sequences",
        "fingerprint c0ffee",
        "4 minutes on a processor",
        "`python ablation.py tiny.yaml --seeds 1`, then `python ablation.py tiny.yaml --seeds 2`",
    ):
        assert fact in text
    assert (tmp_path / "ablation.png").exists()


def test_a_result_that_does_not_say_how_it_was_made_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text(
        json.dumps({"variant": ["DFlash", "decay, gamma 2.5", 0]}) + "\n"
    )
    with pytest.raises(ConfigError, match=r"results\.jsonl:1: does not say"):
        ablation.read_results(tmp_path)
