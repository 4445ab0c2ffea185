"""Whole runs: learning, resuming, splitting over ranks, exporting."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_causal_lm, train_config, write_data

from dflare.checkpoint import check_tensors, read_config
from dflare.training.export import load_drafter
from dflare.training.generate import Generator, Sampling
from dflare.training.slot_cache import ATTENTION
from dflare.training.speculate import decode
from dflare.training.target import Target
from dflare.training.trainer import Interrupted, Trainer


def target() -> Target:
    model = tiny_causal_lm()
    model.set_attn_implementation(ATTENTION)
    return Target(model, (0, 1, 2))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.drafter.state_dict().items()}


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


VARIANTS = [
    {},
    {"objective__soft_labels": 0.5, "objective__frequent": 20, "objective__random": 5},
    {"drafter__architecture": "dflash", "objective__name": "decay", "objective__gamma_end": 9.0},
    {"drafter__shared_kv": True, "run__accumulate": 2},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, changes):
    write_data(tmp_path / "data.jsonl", 14)
    whole = Trainer(train_config(tmp_path, run__output=str(tmp_path / "a"), **changes), target())
    whole.run()

    config = train_config(tmp_path, run__output=str(tmp_path / "b"), **changes)
    first = Trainer(config, target())
    first._ask_to_stop(2, None)  # as a signal would: the run stops at its next report
    with pytest.raises(Interrupted, match="--resume"):
        first.run()
    assert first.steps_done < 6
    second = Trainer(config, target(), resume=True)
    second.run()

    assert_equal(weights(whole), weights(second))
    curves = [
        [
            (line["step"], line["loss"])
            for line in map(json.loads, (tmp_path / run / "log.jsonl").read_text().splitlines())
            if line["kind"] == "train" and line["step"] in (4, 6)
        ]
        for run in ("a", "b")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 2


def test_micro_batches_do_not_change_the_step(tmp_path):
    write_data(tmp_path / "data.jsonl", 14)
    results = []
    for parts in (1, 2, 4):
        config = train_config(
            tmp_path, run__output=str(tmp_path / f"{parts}"), run__accumulate=parts
        )
        trainer = Trainer(config, target())
        for _ in range(2):
            trainer.train_step()
        results.append(weights(trainer))
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensor, other[name], atol=1e-6, rtol=0)


def test_the_tap_cache_gives_the_states_that_the_target_gives(tmp_path):
    write_data(tmp_path / "data.jsonl", 14)
    curves = []
    for run in ("plain", "cold", "warm"):
        cache = None if run == "plain" else str(tmp_path / "taps")
        trainer = Trainer(
            train_config(tmp_path, run__output=str(tmp_path / run), data__tap_cache=cache), target()
        )
        trainer.run()
        curves.append(weights(trainer))
    assert_equal(curves[1], curves[2])
    for name, tensor in curves[0].items():  # the cache rounds states to bfloat16
        torch.testing.assert_close(tensor, curves[1][name], atol=5e-3, rtol=0)


def test_an_export_holds_what_was_trained(tmp_path):
    write_data(tmp_path / "data.jsonl", 14)
    variants = {
        "own": {},
        "shared": {"drafter__shared_kv": True},
        "dflash": {"drafter__architecture": "dflash"},
    }
    for name, changes in variants.items():
        config = train_config(tmp_path, run__output=str(tmp_path / name), **changes)
        trainer = Trainer(config, target())
        trainer.run()
        folder = Path(config.run.output) / "drafter"
        if name != "dflash":
            check_tensors(folder, read_config(folder))
        torch.manual_seed(0)
        taps, embeddings = torch.randn(1, 7, 96), torch.randn(1, 4, 32)
        drafts = []
        for drafter in (trainer.drafter.eval(), load_drafter(folder)):
            context = drafter.context_kv(taps, torch.arange(7)[None])
            positions = torch.arange(7, 11)[None]
            drafts.append(drafter.draft(embeddings, positions, context, {-1: None}))
        assert torch.equal(drafts[0], drafts[1])


def test_a_dflash_export_carries_its_projection(tmp_path):
    write_data(tmp_path / "data.jsonl", 14)
    config = train_config(tmp_path, drafter__architecture="dflash", run__steps=1)
    Trainer(config, target()).run()
    content = json.loads((tmp_path / "run/drafter/config.json").read_text())
    assert content["architectures"] == ["DFlashDraftModel"]
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "run/drafter/model.safetensors")
    assert tensors["fc.weight"].shape == (32, 96) and "layer_fusion_weights" not in tensors


def test_one_answer_is_learned_to_full_accept_length(tmp_path):
    """After overfitting, decoding that prompt accepts whole blocks in every step."""
    prompt, size = [5, 6, 7, 8], 4
    (answer,) = Generator(target(), 1, 64, Sampling(max_new_tokens=25)).run([prompt])
    header = {"dflare_data": 1, "target": "tiny", "vocab_size": 64}
    line = {"ids": prompt + answer.ids, "loss": [[4, 29]]}
    assert 3 not in line["ids"]  # the mask token
    (tmp_path / "data.jsonl").write_text(json.dumps(header) + "\n" + json.dumps(line) + "\n")
    config = train_config(
        tmp_path,
        data__held_out=0,
        data__anchors=30,
        optimizer__learning_rate=5e-3,
        run__steps=150,
        run__log_every=50,
    )
    trainer = Trainer(config, target())
    trainer.run()
    drafter = load_drafter(tmp_path / "run/drafter")
    (decoded,) = decode(target(), drafter, [prompt], 25, ())
    assert decoded.ids == answer.ids
    assert decoded.emitted == [size] * 6  # 24 tokens behind the first one
