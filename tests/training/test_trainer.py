"""Whole runs: learning, resuming, splitting over ranks, exporting."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_causal_lm, train_config, write_data

from dflare.checkpoint import check_tensors, read_config
from dflare.training.data.files import Record, write_records
from dflare.training.data.generate import Generator, Sampling
from dflare.training.data.slot_cache import ATTENTION
from dflare.training.data.target import Target
from dflare.training.drafter.export import export_size, load_drafter
from dflare.training.errors import ConfigError
from dflare.training.run import loop
from dflare.training.run.clock import Clock
from dflare.training.run.config import load_config
from dflare.training.run.loop import Interrupted, train
from dflare.training.run.speculate import decode
from dflare.training.run.trainer import Trainer


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
    {"data__tap_noise": 0.05},
]


def logged(folder: Path) -> list[dict]:
    """The log without what a clock says."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    times = {"time", "minutes", "seconds_per_step"}
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def stop_after(trainer: Trainer, step: int) -> None:
    """Let a signal come during a step."""
    real = trainer.train_step

    def train_step() -> None:
        real()
        if trainer.steps_done == step:
            trainer.ask_to_stop()

    trainer.train_step = train_step


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_resumed_run_ends_with_the_same_bits_and_the_same_log(tmp_path, changes):
    write_data(tmp_path / "data.xz", 14)
    changes = {"run__steps": 7, "run__validate_every": 3, **changes}
    whole = Trainer(train_config(tmp_path, run__output=str(tmp_path / "a"), **changes), target())
    train(whole)

    config = train_config(tmp_path, run__output=str(tmp_path / "b"), **changes)
    for stop in (1, 3, 4):  # between two lines of the log, at a validation, with a line
        trainer = Trainer(config, target(), resume=stop > 1)
        stop_after(trainer, stop)
        with pytest.raises(Interrupted, match="--resume"):
            train(trainer)
        assert trainer.steps_done == stop
    last = Trainer(config, target(), resume=True)
    train(last)

    assert_equal(weights(whole), weights(last))
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    kinds = [(line["kind"], line["step"]) for line in logged(tmp_path / "a")]
    assert kinds == [
        *[("train", 2), ("validation", 3), ("train", 4), ("train", 6), ("validation", 6)],
        *[("train", 7), ("validation", 7)],
    ]


def test_a_time_budget_is_a_schedule_of_its_own(tmp_path, monkeypatch):
    """Warm-up and end go by the clock of every step, and compiling is not training."""
    write_data(tmp_path / "data.xz", 14)
    config = train_config(
        tmp_path,
        optimizer__learning_rate=1.0e-3,
        optimizer__warmup=0.1,
        run__steps=None,
        run__epochs=1000,
        run__max_minutes=1.5,
        run__log_every=25,
    )
    trainer = Trainer(config, target())
    clock, rates, real = [0.0], [], trainer.train_step

    def train_step() -> None:
        real()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        clock[0] += 30.0 if len(rates) == 1 else 1.0

    trainer.train_step = train_step
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    train(trainer)
    assert len(rates) == trainer.steps_done == 61
    assert trainer.minutes == pytest.approx(1.5)
    assert rates[0] > 0.0
    rising = rates[1:8]  # 10 % of the 60 seconds that are left after the first step
    assert rising == sorted(rising) and rates[4] == pytest.approx(0.5e-3, rel=0.01)
    assert max(rates) == pytest.approx(1e-3, rel=0.01)
    assert rates[7:] == sorted(rates[7:], reverse=True) and 0.0 < rates[-1] < 2e-6
    resumed = Trainer(config, target(), resume=True).clock
    assert resumed == trainer.clock and resumed.cold_minutes == pytest.approx(0.5)


def test_a_clock_without_a_budget_counts_steps():
    clock = Clock(total_steps=4, max_minutes=None, minutes=100.0)
    assert (clock.progress(), clock.schedule()) == (0.0, 0.125)
    clock.steps = 4
    assert (clock.progress(), clock.schedule()) == (1.0, 1.0)


def test_a_clock_whose_budget_goes_into_compiling_ends():
    clock = Clock(total_steps=100, max_minutes=2.0, steps=1, minutes=1.9, cold_minutes=1.9)
    assert clock.progress() == 0.01
    clock.minutes = clock.cold_minutes = 2.1
    assert clock.progress() == 1.0


def test_micro_batches_do_not_change_the_step(tmp_path):
    write_data(tmp_path / "data.xz", 14)
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
            # Where a gradient is nearly nothing, Adam makes a step of its rounding.
            torch.testing.assert_close(tensor, other[name], atol=5e-5, rtol=0)


def test_recomputed_activations_do_not_change_a_run(tmp_path):
    write_data(tmp_path / "data.xz", 14)
    results = []
    for recompute in (False, True):
        config = train_config(
            tmp_path,
            run__output=str(tmp_path / f"{recompute}"),
            run__checkpoint_activations=recompute,
        )
        trainer = Trainer(config, target())
        train(trainer)
        results.append(weights(trainer))
    assert_equal(*results)


def test_the_tap_cache_gives_the_states_that_the_target_gives(tmp_path):
    write_data(tmp_path / "data.xz", 14)
    curves = []
    for run in ("plain", "cold", "warm"):
        cache = None if run == "plain" else str(tmp_path / "taps")
        trainer = Trainer(
            train_config(tmp_path, run__output=str(tmp_path / run), data__tap_cache=cache), target()
        )
        train(trainer)
        curves.append(weights(trainer))
    assert_equal(curves[1], curves[2])
    for name, tensor in curves[0].items():  # the cache rounds states to bfloat16
        torch.testing.assert_close(tensor, curves[1][name], atol=5e-3, rtol=0)


def test_fusion_logits_have_a_learning_rate_of_their_own(folder):
    """At the rate of the matrices a run could not re-rank the taps."""
    moved = {}
    for rate in (0.0, 1.0, 20.0):
        output = str(folder / f"{rate}")
        config = train_config(folder, optimizer__fusion_rate=rate, run__output=output)
        trainer = Trainer(config, target())
        before = weights(trainer)
        for _ in range(4):
            trainer.train_step()
        after = weights(trainer)
        moved[rate] = (after["layer_fusion_weights"] - before["layer_fusion_weights"]).abs().max()
        assert not torch.equal(after["norm.weight"], before["norm.weight"])
    assert moved[0.0] == 0.0 and moved[20.0] > 10 * moved[1.0] > 0.0


def test_fusion_starts_by_the_sizes_of_the_taps_that_the_data_shows(folder):
    trainer = Trainer(train_config(folder), target())
    published = Trainer(
        train_config(folder, drafter__init="random", run__output=str(folder / "r")), target()
    )
    start = published.drafter.layer_fusion_weights
    assert set(start.flatten().tolist()) == {0.0, 2.0}
    assert len(set(trainer.drafter.layer_fusion_weights.flatten().tolist())) > 3


def test_noise_on_the_taps_is_for_training_alone(folder):
    losses, held_out = [], []
    for noise in (0.0, 0.5):
        config = train_config(folder, data__tap_noise=noise, run__output=str(folder / f"{noise}"))
        trainer = Trainer(config, target())
        held_out.append(trainer.validate())
        trainer.train_step()
        losses.append(trainer.take_window().loss)
    assert losses[0] != losses[1] and held_out[0] == held_out[1]


def test_noise_is_a_share_of_each_taps_own_size(folder):
    trainer = Trainer(train_config(folder, data__tap_noise=0.1), target())
    taps = torch.randn(2, 400, 96) * torch.tensor([1.0, 5.0, 25.0]).repeat_interleave(32)
    noisy = trainer._step._noisy(taps, torch.Generator().manual_seed(0))
    parts, noise = (part.unflatten(-1, (3, 32)) for part in (taps, noisy - taps))
    share = noise.square().mean((0, 1, 3)).sqrt() / parts.square().mean((0, 1, 3)).sqrt()
    torch.testing.assert_close(share, torch.full((3,), 0.1), rtol=0.05, atol=0)


def test_the_update_is_one_kernel_on_every_device(folder):
    assert Trainer(train_config(folder), target()).optimizer.defaults["fused"]


def test_the_demo_runs_look_at_held_out_data_while_they_train():
    for name in ("cpu-train", "gpu-train"):
        config = load_config(Path(__file__).parents[2] / f"configs/demo/{name}.yaml")
        assert config.data.held_out and config.run.validate_every
        assert config.data.max_length >= 512 and config.data.tap_noise > 0


def test_an_export_holds_what_was_trained(tmp_path):
    write_data(tmp_path / "data.xz", 14)
    variants = {
        "own": {},
        "shared": {"drafter__shared_kv": True},
        "dflash": {"drafter__architecture": "dflash"},
    }
    for name, changes in variants.items():
        config = train_config(tmp_path, run__output=str(tmp_path / name), **changes)
        trainer = Trainer(config, target())
        train(trainer)
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "changes", [{}, {"drafter__shared_kv": True}, {"drafter__architecture": "dflash"}]
)
def test_the_size_of_an_export_is_known_before(tmp_path, changes, dtype):
    write_data(tmp_path / "data.xz", 14)
    config = train_config(tmp_path, drafter__dtype=dtype, run__steps=1, **changes)
    trainer = Trainer(config, target())
    promised = export_size(trainer.drafter)
    train(trainer)
    size = (tmp_path / "run/drafter/model.safetensors").stat().st_size
    assert size <= promised < size + 5000  # a header's length is estimated from above


def test_a_dflash_export_carries_its_projection(tmp_path):
    write_data(tmp_path / "data.xz", 14)
    config = train_config(tmp_path, drafter__architecture="dflash", run__steps=1)
    train(Trainer(config, target()))
    content = json.loads((tmp_path / "run/drafter/config.json").read_text())
    assert content["architectures"] == ["DFlashDraftModel"]
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "run/drafter/model.safetensors")
    assert tensors["fc.weight"].shape == (32, 96) and "layer_fusion_weights" not in tensors


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_another_tracker_gets_what_the_log_holds(tmp_path, monkeypatch, tracker):
    started, logged_there, ended = [], {}, []

    def log(values, step):
        logged_there.setdefault(step, {}).update(values)

    run = SimpleNamespace(log=log, finish=lambda: ended.append(True))
    package = SimpleNamespace(init=lambda **how: started.append(how) or run)
    monkeypatch.setitem(sys.modules, tracker, package)
    write_data(tmp_path / "data.xz", 14)
    config = train_config(tmp_path, run__steps=2, run__log_every=1, run__tracker=tracker)
    train(Trainer(config, target()))
    assert started[0]["project"] == "dflare" and started[0]["name"] == Path(config.run.output).name
    assert started[0]["config"]["run"]["steps"] == 2 and ended == [True]
    for line in logged(Path(config.run.output)):
        numbers = logged_there[line["step"]]
        assert numbers[f"{line['kind']}/accept_length"] == line["accept_length"]
        assert numbers[f"{line['kind']}/reached/slot01"] == line["reached"][0]
    assert not (Path(config.run.output) / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    write_data(tmp_path / "data.xz", 14)
    config = train_config(tmp_path, run__tracker="trackio")
    trainer = Trainer(config, target())
    with pytest.raises(ConfigError, match=r"run.tracker is trackio.*pip install trackio"):
        train(trainer)
    assert trainer.steps_done == 0


def test_one_answer_is_learned_to_full_accept_length(tmp_path):
    """After overfitting, decoding that prompt accepts whole blocks in every step."""
    prompt, size = [5, 6, 7, 8], 4
    (answer,) = Generator(target(), 1, 64, Sampling(max_new_tokens=25)).run([prompt])
    record = Record(prompt + answer.ids, [(4, 29)])
    assert 3 not in record.ids  # the mask token
    write_records(tmp_path / "data.xz", {"target": "tiny", "vocab_size": 64}, [record])
    config = train_config(
        tmp_path,
        data__held_out=0,
        data__anchors=30,
        optimizer__learning_rate=5e-3,
        run__steps=150,
        run__log_every=50,
    )
    trainer = Trainer(config, target())
    train(trainer)
    drafter = load_drafter(tmp_path / "run/drafter")
    (decoded,) = decode(target(), drafter, [prompt], 25, ())
    assert decoded.ids == answer.ids
    assert decoded.emitted == [size] * 6  # 24 tokens behind the first one
