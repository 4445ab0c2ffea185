"""Tensors are held against config.json both ways, from the headers of the files."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoints import random_draft_config, random_tensors, write_random_draft, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dflare.checkpoint import (
    DraftConfig,
    check_finite,
    check_tensors,
    draft_sizes,
    expected_tensors,
    load_tensors,
    make_config,
    read_config,
    read_headers,
)
from dflare.errors import CheckpointError


def published_4b() -> DraftConfig:
    """AngelSlim/Qwen3-4b-dflare (configs/qwen3_dflare.json in Tencent/AngelSlim)."""
    values = {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 7,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope": {"theta": 1000000},
        "max_position_embeddings": 40960,
        "vocab_size": 151936,
        "block_size": 16,
        "mask_token_id": 151669,
        "target_layer_ids": (1, 5, 9, 13, 17, 21, 25, 29, 33),
        "num_target_layers": 36,
        "layer_types": ("full_attention",) * 7,
    }
    return make_config(values, "published")


def write_changed(folder: Path, change, **settings) -> DraftConfig:
    """Write a drafter whose tensors went through `change`."""
    config = random_draft_config(**settings)
    write_random_draft(folder, config=config)
    tensors = random_tensors(config)
    change(tensors)
    write_tensors(folder, tensors)
    return config


def error_of(folder: Path, config: DraftConfig) -> str:
    with pytest.raises(CheckpointError) as error:
        check_tensors(folder, config)
    return str(error.value)


def test_sizes_are_those_of_the_published_checkpoint():
    config = published_4b()
    sizes = draft_sizes(config)
    assert len(expected_tensors(config)) == 94
    header = 1_486_452_278 - sizes.weight_bytes  # the file on the hub, less the weights
    assert 8 < header < 94 * 200
    assert sizes.kv_bytes_per_token == 7 * 2 * 8 * 128 * 2


@pytest.mark.parametrize("shards", [1, 3])
def test_headers_are_what_safetensors_reads(tmp_path, shards):
    write_random_draft(tmp_path, shards=shards)
    headers = read_headers(tmp_path)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                found[name] = (tuple(weights.get_slice(name).get_shape()), file)
    assert {name: (header.shape, header.file) for name, header in headers.items()} == found


def test_every_problem_is_in_one_message(tmp_path):
    def change(tensors):
        del tensors["norm.weight"], tensors["layers.1.self_attn.k_proj_target.weight"]
        tensors["lm_head.weight"] = torch.zeros(2, 2)
        tensors["hidden_norm.weight"] = torch.zeros(7)
        tensors["layers.0.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"].double()

    text = error_of(tmp_path, write_changed(tmp_path, change))
    assert "missing tensors: norm.weight, layers.1.self_attn.k_proj_target.weight" in text
    assert "unknown tensors: lm_head.weight" in text
    assert "`hidden_norm.weight` is [7], expected [64]" in text
    assert "`layers.0.mlp.up_proj.weight` is F64, expected float32" in text
    assert "4 problems" in text


def test_weights_of_another_depth_are_told_by_the_number_of_layers(tmp_path):
    write_random_draft(tmp_path, num_layers=3)
    for layers in (2, 5):
        config = random_draft_config(num_layers=layers)
        text = error_of(tmp_path, config)
        assert f"`num_hidden_layers` is {layers} and the weights hold 3 layers" in text
        assert f"D = {layers} draft layers" in text
        assert "missing tensors" not in text
        assert "unknown tensors" not in text


def test_weights_of_other_taps_are_told_by_the_fusion_weights(tmp_path):
    write_random_draft(tmp_path, taps=(1, 2, 3, 4))
    text = error_of(tmp_path, random_draft_config(taps=(1, 3, 5)))
    assert "`layer_fusion_weights` is [2, 4], expected [2, 3]" in text
    assert "T = 3 taps [1, 3, 5]" in text
    assert "`target_layer_ids`" in text


def test_a_dflash_checkpoint_is_told_by_its_projection(tmp_path):
    def change(tensors):
        del tensors["layer_fusion_weights"]
        tensors["fc.weight"] = torch.zeros(64, 192)

    config = write_changed(tmp_path, change)
    assert "serve it with --speculative-algorithm DFLASH" in error_of(tmp_path, config)


def test_a_projection_beside_fusion_weights_is_unknown(tmp_path):
    config = write_changed(tmp_path, lambda t: t.update({"fc.weight": torch.zeros(64, 192)}))
    assert "unknown tensors: fc.weight" in error_of(tmp_path, config)


def test_two_names_for_one_tensor_are_refused(tmp_path):
    folder = write_random_draft(tmp_path, dialect="vllm")
    config = read_config(folder)
    tensors = {f"model.{name}": value for name, value in random_tensors(config).items()}
    tensors["final_norm.weight"] = tensors["model.norm.weight"].clone()
    write_tensors(folder, tensors)
    text = error_of(folder, config)
    assert "model.norm.weight" in text
    assert "final_norm.weight" in text


def test_missing_files_are_named(tmp_path):
    folder = write_random_draft(tmp_path / "d", shards=3)
    config = read_config(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "names files that are not there: model-00002-of-00003" in error_of(folder, config)

    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    assert "`weight_map` is empty or missing" in error_of(folder, config)

    for file in [index, *folder.glob("*.safetensors")]:
        file.unlink()
    assert "no *.safetensors file, expected model.safetensors" in error_of(folder, config)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = write_random_draft(tmp_path)
    write_tensors(tmp_path, random_tensors(random_draft_config()), shards=2)
    (folder / "model.safetensors.index.json").unlink()
    text = error_of(folder, random_draft_config())
    assert "is in both model-00001-of-00002.safetensors and model.safetensors" in text


@settings(deadline=None, max_examples=40)
@given(keep=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(keep):
    with tempfile.TemporaryDirectory() as root:
        folder = write_random_draft(Path(root), hidden_size=16)
        file = folder / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(CheckpointError, match=r"model\.safetensors .*fetch it again"):
            read_headers(folder)


@pytest.mark.parametrize(
    "content", [b"not safetensors at all", b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{,"]
)
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*fetch it again"):
        read_headers(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted(tmp_path, bad, dtype):
    def change(tensors):
        tensors["layers.0.mlp.up_proj.weight"][3, :2] = bad

    config = write_changed(tmp_path, change, dtype=dtype)
    check_tensors(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"`layers\.0\.mlp\.up_proj\.weight` \(2 of 6144\)"):
        check_finite(tmp_path, config)


def test_some_tensors_can_be_loaded_alone(tmp_path):
    folder = write_random_draft(tmp_path, shards=2)
    config = read_config(folder)
    loaded = load_tensors(folder, config, ["norm.weight", "layer_fusion_weights"])
    assert loaded.keys() == {"norm.weight", "layer_fusion_weights"}


def test_nothing_but_the_header_is_read(tmp_path):
    """A checkpoint far larger than memory is checked: its weights are a hole in a sparse file."""
    config = published_4b().model_copy(update={"hidden_size": 1 << 17})
    entries, offset = {}, 0
    for name, shape in expected_tensors(config).items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    assert len(check_tensors(tmp_path, config)) == 94


def test_weights_are_read_once_while_the_file_stays_as_it_is(tmp_path, monkeypatch):
    draft = write_random_draft(tmp_path / "draft")
    config = read_config(draft)
    check_finite(draft, config)

    def open_headers(file, framework):
        assert framework == "np", "the weights are read again"
        return safe_open(file, framework)

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.safe_open", open_headers)
        check_finite(draft, config)
    weights = load_file(draft / "model.safetensors")
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    weights["norm.weight"][0] = float("inf")
    save_file(weights, draft / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"`norm.weight` \(1 of 64\)"):
        check_finite(draft, config)
