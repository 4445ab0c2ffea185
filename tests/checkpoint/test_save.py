"""A checkpoint is written whole or not at all, and never over another by accident."""

import stat

import pytest
import safetensors.torch
import torch
from checkpoints import random_draft_config, random_tensors, write_random_draft

from dflare.checkpoint import load_tensors, read_config, save_checkpoint
from dflare.errors import CheckpointError


def test_what_is_saved_is_what_is_read(tmp_path):
    config = random_draft_config(dtype="bfloat16")
    tensors = random_tensors(config)
    folder = save_checkpoint(tmp_path / "a" / "draft", config, tensors)

    assert read_config(folder) == config
    loaded = load_tensors(folder, config)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert [path.name for path in folder.parent.iterdir()] == ["draft"], "nothing is left beside it"
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert len(modes) == 1, "whoever can read the config can read the weights"


def test_views_and_other_devices_are_saved_as_they_look(tmp_path):
    config = random_draft_config()
    tensors = random_tensors(config)
    name = "layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].t().contiguous().t()
    folder = save_checkpoint(tmp_path / "draft", config, tensors)
    assert torch.equal(load_tensors(folder, config)[name], tensors[name])


def test_a_checkpoint_is_replaced_only_by_force(tmp_path):
    config = random_draft_config()
    folder = write_random_draft(tmp_path / "draft", seed=0, shards=3)
    (folder / "README.md").write_text("card")
    new = random_tensors(config, seed=1)

    with pytest.raises(CheckpointError, match=r"holds a checkpoint already.*--force"):
        save_checkpoint(folder, config, new)
    save_checkpoint(folder, config, new, force=True)

    loaded = load_tensors(folder, config)
    assert all(torch.equal(loaded[name], new[name]) for name in new)
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    config = random_draft_config()
    with pytest.raises(CheckpointError, match="is not a checkpoint; choose another folder"):
        save_checkpoint(tmp_path, config, random_tensors(config), force=True)
    file = tmp_path / "thesis.tex"
    with pytest.raises(CheckpointError, match="is not a checkpoint; choose another folder"):
        save_checkpoint(file, config, random_tensors(config), force=True)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    config = random_draft_config()
    folder = write_random_draft(tmp_path / "draft", seed=0)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left on device.*free some space"):
        save_checkpoint(folder, config, random_tensors(config, seed=1), force=True)

    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_tensors_that_do_not_belong_are_all_named(tmp_path):
    config = random_draft_config()
    tensors = random_tensors(config)
    tensors["extra"] = tensors.pop("norm.weight")
    tensors["hidden_norm.weight"] = torch.zeros(3)
    tensors["layer_fusion_weights"] = tensors["layer_fusion_weights"].bfloat16()
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path / "draft", config, tensors)
    text = str(error.value)
    assert "missing tensors: norm.weight" in text
    assert "unknown tensors: extra" in text
    assert "`hidden_norm.weight` is [3], expected [64]" in text
    assert "`layer_fusion_weights` is bfloat16, expected float32" in text
    assert not (tmp_path / "draft").exists()
