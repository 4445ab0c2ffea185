"""What goes wrong ends in a message that says what to do, and loses nothing."""

import json
import os
import resource
import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
from tiny_models import tiny_causal_lm, tiny_target, train_config, write_data
from typer.testing import CliRunner

from dflare.cli.app import app, main
from dflare.errors import CheckpointError, DFlareError, UnsupportedError
from dflare.training.data.target import Target, load_target
from dflare.training.drafter.export import export_drafter
from dflare.training.errors import ConfigError, DataError, TrainingError
from dflare.training.run.config import load_config, parse_config
from dflare.training.run.loop import train
from dflare.training.run.snapshot import FILE
from dflare.training.run.trainer import Trainer


@pytest.mark.parametrize(
    ("changes", "error", "hint"),
    [
        ({"drafter__mask_token_id": 64}, ConfigError, "vocabulary ends at 63"),
        ({"drafter__mask_token_id": 9}, ConfigError, "occurs .* times"),
        ({"drafter__taps": [0, 4]}, CheckpointError, "target_layer_ids"),
        ({"drafter__intermediate_size": 65}, ConfigError, "init=random"),
        ({"drafter__init_layers": [2, 4]}, ConfigError, "layers 0 to 3"),
        ({"data__batch_size": 5, "run__accumulate": 2}, ConfigError, "multiple of"),
        ({"data__files": ["none.xz"]}, DataError, "none.xz"),
        ({"data__max_length": 4}, DataError, "nothing to learn"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_first_step(folder, changes, error, hint):
    with pytest.raises(error, match=hint):
        Trainer(train_config(folder, **changes), tiny_target())
    assert not (folder / "run" / FILE).exists()


@pytest.mark.parametrize("changes", [{"drafter__init": "draft"}, {"drafter__block_size": 8}])
def test_a_block_is_extended_from_a_trained_drafter_with_a_smaller_one(folder, changes):
    with pytest.raises(ConfigError, match=r"objective.extends is 4.*in drafter.init, and a larger"):
        train_config(folder, objective__extends=4, **changes)
    train_config(folder, objective__extends=4, drafter__init="draft", drafter__block_size=8)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"data__server": "http://127.0.0.1:1"}, "needs data.states"),
        ({"data__server": "http://127.0.0.1:1", "data__states": "."}, r"drafter\.init"),
    ],
)
def test_a_server_of_states_needs_a_folder_and_a_started_drafter(folder, changes, hint):
    with pytest.raises(ConfigError, match=hint):
        train_config(folder, drafter__init="target", **changes)


def test_a_tap_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"drafter.taps is \[0, 4\].*layers 0 to 3"):
        Target(tiny_causal_lm(), (0, 4))


def test_data_of_another_tokenizer_is_refused(folder):
    write_data(folder / "data.xz", 14, vocab_size=32)
    with pytest.raises(DataError, match=r"vocabulary of 32 .*the target has 64"):
        Trainer(train_config(folder), tiny_target())


def test_a_target_with_capped_logits_is_refused():
    model = tiny_causal_lm()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UnsupportedError, match="final_logit_softcapping"):
        Target(model)


def test_a_target_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load_target(str(tmp_path / "none"))


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_snapshot(folder):
    trainer = Trainer(train_config(folder, run__steps=2), tiny_target())
    train(trainer)
    before = (folder / "run" / FILE).read_bytes()
    config = train_config(folder, run__steps=6)
    trainer = Trainer(config, tiny_target(), resume=True)
    with torch.no_grad():
        trainer.drafter.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"loss is nan after step 4.*learning_rate"):
        train(trainer)
    assert (folder / "run" / FILE).read_bytes() == before


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_never_saved(folder):
    """The loss of that step is still finite; the weights after it are not."""
    config = train_config(folder, run__save_minutes=1e-9, run__log_every=100)
    trainer = Trainer(config, tiny_target())

    def overflow(gradient):
        return gradient * float("inf") if trainer.steps_done == 3 else gradient

    trainer.drafter.norm.weight.register_hook(overflow)
    with pytest.raises(
        TrainingError, match=r"norm of the gradient is (inf|nan) after step 4; .*is from before"
    ):
        train(trainer)
    snapshot = torch.load(folder / "run" / FILE, weights_only=True)
    assert snapshot["step"] == 3
    assert all(tensor.isfinite().all() for tensor in snapshot["model"].values())
    resumed = Trainer(config, tiny_target(), resume=True)
    train(resumed)
    assert resumed.steps_done == 6


def test_a_run_is_not_overwritten(folder):
    train(Trainer(train_config(folder, run__steps=1), tiny_target()))
    with pytest.raises(ConfigError, match="--resume"):
        Trainer(train_config(folder), tiny_target())


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate"),
        ({"drafter__block_size": 5}, "drafter.block_size"),
        ({"data__max_length": 15}, "data.max_length"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(folder, changes, hint):
    train(Trainer(train_config(folder, run__steps=1), tiny_target()))
    with pytest.raises(ConfigError, match=hint):
        Trainer(train_config(folder, **changes), tiny_target(), resume=True)


def test_a_run_is_not_resumed_with_other_data(folder):
    train(Trainer(train_config(folder, run__steps=1), tiny_target()))
    write_data(folder / "data.xz", 14, seed=9)
    with pytest.raises(ConfigError, match="other training data"):
        Trainer(train_config(folder), tiny_target(), resume=True)


def test_there_must_be_something_to_resume(folder):
    with pytest.raises(ConfigError, match="without --resume"):
        Trainer(train_config(folder), tiny_target(), resume=True)


def test_a_full_disk_leaves_the_last_snapshot(folder, monkeypatch):
    train(Trainer(train_config(folder, run__steps=2), tiny_target()))
    before = (folder / "run" / FILE).read_bytes()
    trainer = Trainer(train_config(folder, run__steps=4), tiny_target(), resume=True)

    def no_space(content, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(
        TrainingError, match=r"No space left.*GiB are free.*before it is intact.*--resume"
    ):
        train(trainer)
    assert (folder / "run" / FILE).read_bytes() == before
    assert not list((folder / "run").glob("*.partial"))


def test_a_tap_cache_without_room_is_refused(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(TrainingError, match="tap_cache needs"):
        Trainer(train_config(folder, data__tap_cache=str(folder / "taps")), tiny_target())


def test_a_tap_cache_holds_its_room_on_the_disk_before_the_first_step(folder, monkeypatch):
    """States are written through a mapping, where a full disk would be a bus error."""
    config = train_config(folder, data__tap_cache=str(folder / "taps"), run__steps=1)
    states = folder / "taps" / "states.bin"

    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(TrainingError, match=r"tap_cache needs .*No space left.*make room"):
            Trainer(config, tiny_target())
    assert not states.exists(), "a refused cache takes no room"

    trainer = Trainer(config, tiny_target())
    assert 512 * states.stat().st_blocks >= states.stat().st_size > 0, "the file has holes"
    train(trainer)
    # A file with holes, as `cp --sparse` makes them, is filled up or refused when a run goes on.
    content = states.read_bytes()
    with states.open("r+b") as file:
        file.truncate(0)
        file.truncate(len(content))
    resumed = train_config(folder, data__tap_cache=str(folder / "taps"))
    with monkeypatch.context() as full_disk:
        full_disk.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(TrainingError, match=r"tap_cache needs .*No space left"):
            Trainer(resumed, tiny_target(), resume=True)
    Trainer(resumed, tiny_target(), resume=True)
    assert 512 * states.stat().st_blocks >= states.stat().st_size == len(content)


def test_a_tap_cache_of_other_data_is_refused(folder):
    config = train_config(folder, data__tap_cache=str(folder / "taps"), run__steps=1)
    train(Trainer(config, tiny_target()))
    write_data(folder / "data.xz", 14, seed=9)
    other = {"data__tap_cache": str(folder / "taps"), "run__output": str(folder / "other")}
    with pytest.raises(ConfigError, match="other data"):
        Trainer(train_config(folder, **other), tiny_target())


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 4 KiB: as a disk that runs full while it writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextmanager
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.mark.parametrize("architecture", ["dflare", "dflash"])
def test_an_export_without_room_leaves_the_old_one(folder, small_files, architecture):
    changes = {"drafter__architecture": architecture, "run__steps": 1}
    trainer = Trainer(train_config(folder, **changes), tiny_target())
    train(trainer)
    out = folder / "run" / "drafter"
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    state = trainer.drafter.state_dict()
    with (
        pytest.raises(CheckpointError, match=r"cannot be written .*free some space"),
        small_files(),
    ):
        export_drafter(trainer.drafter, state, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert not list(out.parent.glob(".drafter*"))

    (out / "config.json").unlink()
    with pytest.raises(TrainingError, match=r"drafter: .*not a checkpoint.*--resume exports"):
        train(Trainer(train_config(folder, **changes), tiny_target(), resume=True))
    shutil.rmtree(out)
    train(Trainer(train_config(folder, **changes), tiny_target(), resume=True))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_unknown_and_missing_settings_are_all_named():
    content = {"target": {"name": "x"}, "drafter": {"layers": 0, "tops": 3}, "data": {}}
    with pytest.raises(ConfigError) as error:
        parse_config(content, "my.yaml")
    text = str(error.value)
    for part in ("my.yaml", "drafter.layers is 0", "drafter.tops is not", "run is missing"):
        assert part in text


@pytest.mark.parametrize(
    ("section", "settings", "hint"),
    [
        ("drafter", {"architecture": "dflash", "shared_kv": True}, "shared_kv"),
        ("drafter", {"init_layers": [1]}, "init_layers"),
        ("objective", {"random": 5}, "objective.frequent"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(folder, section, settings, hint):
    content = train_config(folder).model_dump(mode="json")
    content[section] |= settings
    with pytest.raises(ConfigError, match=hint):
        parse_config(content, "c.yaml")


def test_overrides_change_settings_and_are_checked(folder):
    file = folder / "c.yaml"
    file.write_text(json.dumps(train_config(folder).model_dump(mode="json")))
    config = load_config(file, ["drafter.taps=[0, 2]", "optimizer.learning_rate=1e-2"])
    assert config.drafter.taps == (0, 2) and config.optimizer.learning_rate == 0.01
    for wrong, hint in {"drafter.taps": "section.key=value", "run.stepz=3": "run.stepz"}.items():
        with pytest.raises(ConfigError, match=hint):
            load_config(file, [wrong])


def test_the_command_line_prints_one_line_and_exits_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dflare", "train", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit) as exit_status:
        main()
    assert exit_status.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("dflare: ") and "none.yaml" in error and "Traceback" not in error


def test_commands_without_prompts_say_which_options_give_them(tmp_path):
    for arguments in (
        ["synth", str(tmp_path / "d.xz"), "--target", "x"],
        ["evaluate", "x", "--target", "y"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, DFlareError) and "--prompts" in str(result.exception)


def test_snapshots_that_will_not_fit_are_refused_before_the_first_step(folder, monkeypatch):
    trainer = Trainer(train_config(folder), tiny_target())
    size = 12 * sum(parameter.numel() for parameter in trainer.drafter.parameters())

    def with_room(room):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, room))

    with_room(2 * size - 1)
    with pytest.raises(TrainingError, match=r"run.output .*snapshots.*GiB are free.*make room"):
        train(trainer)
    assert trainer.steps_done == 0
    with_room(2 * size)
    train(trainer)
    saved = (folder / "run" / FILE).stat().st_size
    assert size < saved < 1.2 * size + 10_000
    with_room(size)  # beside the snapshot that is there, one more
    train(Trainer(train_config(folder, run__steps=7), tiny_target(), resume=True))


def test_a_setting_of_generation_that_makes_no_sense_is_named(monkeypatch, capsys, tmp_path):
    command = ["dflare", "synth", str(tmp_path / "out.jsonl.xz"), "--target", "demo"]
    monkeypatch.setattr(sys, "argv", [*command, "--templated", "1", "--max-new-tokens", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "--max-new-tokens 0: Input should be greater than 0" in capsys.readouterr().err
