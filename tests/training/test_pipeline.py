"""The one command: every stage once, also when it is interrupted and repeated."""

import json

import pytest
import yaml
from checkpoints import VOCAB_SIZE, write_random_target
from tiny_models import write_data

from dflare.checkpoint import check_tensors, read_config
from dflare.training.data.files import read_records
from dflare.training.errors import ConfigError, TrainingError
from dflare.training.run import pipeline
from dflare.training.run.pipeline import Stages, load_pipeline, run_pipeline


@pytest.fixture
def folder(tmp_path):
    write_random_target(tmp_path / "target", num_layers=4)
    (tmp_path / "questions.txt").write_text("what is a fish\nwho are you\n")
    (tmp_path / "openers.txt").write_text("\nwhat is\n")
    (tmp_path / "templates.yaml").write_text(
        'lists: {x: {from: 1, to: 99}}\ntemplates: ["a {x}?"]\n'
    )
    write_data(tmp_path / "corpus/one.xz", 5, vocab_size=VOCAB_SIZE)
    train = {
        "target": {"name": str(tmp_path / "target")},
        "drafter": {"layers": 1, "taps": [0, 1], "block_size": 3, "mask_token_id": 3},
        "data": {
            "files": ["replaced.xz"],
            "max_length": 200,
            "batch_size": 2,
            "anchors": 4,
            "held_out": 2,
            "tap_cache": "replaced",
        },
        "run": {"output": "replaced", "steps": 4, "device": "cpu", "threads": 1, "log_every": 2},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    stages = {
        "train": "train.yaml",
        "corpus": ["corpus/*.xz"],
        "synth": {
            "self_written": 3,
            "templates": "templates.yaml",
            "templated": 3,
            "minutes": 1.0,
            "rows": 16,
            "openers": "openers.txt",
            "exclude": ["questions.txt"],
            "max_new_tokens": 12,
            "max_length": 256,
        },
        "draft_vocabulary": 12,
        "evaluate": {"prompts": ["questions.txt"], "max_new_tokens": 8, "rows": 4},
    }
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(stages))
    return tmp_path


def run(folder, *overrides):
    return run_pipeline(folder / "all.yaml", folder / "work", folder / "out", list(overrides))


@pytest.mark.slow
def test_all_stages_give_a_drafter_with_its_card_and_numbers(folder, monkeypatch):
    trained = []
    real = pipeline.Trainer

    def interrupted_once(config, resume):
        trainer = real(config, resume=resume)
        trained.append(resume)
        if len(trained) == 1:
            trainer.ask_to_stop()
        return trainer

    monkeypatch.setattr(pipeline, "Trainer", interrupted_once)
    with pytest.raises(TrainingError, match="--resume"):
        run(folder)
    data = (folder / "work/data.xz").read_bytes()
    out = run(folder)
    assert trained == [False, True]
    assert (folder / "work/data.xz").read_bytes() == data
    check_tensors(out, read_config(out))
    assert read_config(out).draft_vocab_size == 12
    report = json.loads((out / "evaluation.json").read_text())
    assert report["questions"]["prompts"] == 2 and report["held_out"]["prompts"] >= 1
    card = (out / "README.md").read_text()
    assert f"{report['questions']['drafter']['accept_length']:.3f}" in card
    assert "4 steps of 2 sequences x 4 anchors" in card
    assert "It drafts 12 tokens, the" in card
    written = len(list(read_records(folder / "work/data.xz")))
    assert written >= 4 and f"- Data: {5 + written} prompts" in card  # with the corpus's 5
    assert len(list(out.iterdir())) <= 8  # small enough to carry
    # A third call has nothing left but to measure again.
    run(folder)
    assert trained == [False, True]


def test_a_drafter_too_large_to_ship_is_refused_before_anything_is_generated(folder, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_BYTES", 4096)
    with pytest.raises(ConfigError, match=r"MiB of weights.*lower drafter.intermediate_size"):
        run(folder)
    assert not (folder / "work/data.xz").exists()


def test_generation_time_adds_up_over_interruptions(tmp_path):
    for _ in range(2):
        stages = Stages(tmp_path / "stages.json")
        with pytest.raises(KeyboardInterrupt), stages.counting():
            raise KeyboardInterrupt
    again = Stages(tmp_path / "stages.json")
    assert again.state["synth_minutes"] > 0.0 and not again.state["synth_done"]


@pytest.mark.parametrize(
    ("stages", "hint"),
    [
        ("train: x.yaml\nevaluate: {prompts: [q], max_new_tokens: 1, rows: 1}\n", "no data"),
        (
            "train: x.yaml\nsynth: {minutes: 1, rows: 1, max_new_tokens: 1, max_length: 9, "
            "templated: 4}\nevaluate: {prompts: [q], max_new_tokens: 1, rows: 1}\n",
            "templated needs templates",
        ),
    ],
)
def test_stages_without_data_are_refused(tmp_path, stages, hint):
    (tmp_path / "p.yaml").write_text(stages)
    with pytest.raises(ConfigError, match=hint):
        load_pipeline(tmp_path / "p.yaml")


def test_unknown_stages_are_refused(tmp_path):
    (tmp_path / "p.yaml").write_text("train: x.yaml\nsynth: {}\npolish: {}\n")
    with pytest.raises(ConfigError, match="polish"):
        load_pipeline(tmp_path / "p.yaml")
