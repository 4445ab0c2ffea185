"""Every dialect says the same thing: converting changes names, never a bit of a weight."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoints import config_content, random_draft_config, random_tensors, write_random_draft
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dflare.checkpoint import DraftConfig, convert, load_tensors, read_config
from dflare.errors import CheckpointError

DIALECTS = ("angelslim", "angelspec", "vllm")


@st.composite
def draft_configs(draw: st.DrawFn) -> DraftConfig:
    layers = draw(st.integers(1, 4))
    kv_heads = draw(st.integers(1, 3))
    depth = draw(st.integers(3, 40))
    taps = draw(st.sets(st.integers(0, depth - 2), min_size=1, max_size=9))
    kinds = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    scaled = {"theta": 5e5, "type": "linear", "parameters": {"factor": 4.0}}
    return random_draft_config(
        hidden_size=8 * draw(st.integers(1, 4)),
        num_layers=layers,
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 16])),
        intermediate_size=draw(st.integers(1, 24)),
        num_target_layers=depth,
        taps=tuple(sorted(taps)),
        block_size=draw(st.integers(2, 32)),
        mask_token_id=draw(st.integers(0, 99)),
        vocab_size=100,
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        attention_bias=draw(st.booleans()),
        layer_types=tuple("sliding_attention" if s else "full_attention" for s in kinds),
        sliding_window=draw(st.integers(1, 4096)) if any(kinds) else None,
        rope=draw(st.sampled_from([{"theta": 1e4}, scaled])),
    )


@settings(deadline=None, max_examples=60)
@given(
    config=draft_configs(),
    dialect=st.sampled_from(DIALECTS),
    shards=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_converting_keeps_config_and_weights(config, dialect, shards, seed):
    with tempfile.TemporaryDirectory() as root:
        source, result = Path(root, "source"), Path(root, "result")
        write_random_draft(source, seed=seed, dialect=dialect, shards=shards, config=config)

        assert convert(source, result) == config

        assert read_config(result) == config
        written = load_file(result / "model.safetensors")
        original = random_tensors(config, seed)
        assert written.keys() == original.keys()
        assert all(torch.equal(written[name], original[name]) for name in original)
        assert {file.name for file in result.iterdir()} == {"config.json", "model.safetensors"}


@settings(deadline=None, max_examples=20)
@given(config=draft_configs(), dialect=st.sampled_from(DIALECTS), shards=st.integers(1, 3))
def test_any_dialect_can_be_read_without_converting(config, dialect, shards):
    with tempfile.TemporaryDirectory() as root:
        folder = write_random_draft(Path(root, "d"), dialect=dialect, shards=shards, config=config)
        found = read_config(folder)

        assert found == config.model_copy(update={"dialect": dialect})
        original = random_tensors(config)
        loaded = load_tensors(folder, found)
        assert loaded.keys() == original.keys()
        assert all(torch.equal(loaded[name], original[name]) for name in original)


def write_content(folder: Path, content: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_angelspec_counts_taps_where_angelslim_counts_target_layers(tmp_path):
    # The shape of angelspec/config/dflare_draft_config.json in Tencent/AngelSpec.
    content = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "dflash",
        "model_arch": "dflare",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 7,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "num_target_layers": 9,
        "target_hidden_size": 4096,
        "target_num_hidden_layers": 36,
        "mask_token_id": 151669,
        "torch_dtype": "bfloat16",
    }
    config = read_config(write_content(tmp_path, content), block_size=16)

    assert config.num_taps == 9
    assert config.target_layer_ids == (1, 5, 9, 13, 17, 21, 25, 29, 33)
    assert config.num_target_layers == 36
    assert config.head_dim == 128
    assert config.block_size == 16

    with pytest.raises(CheckpointError, match="`block_size` is missing"):
        read_config(tmp_path)


def test_convert_takes_the_block_size_that_angelspec_does_not_write(tmp_path):
    config = random_draft_config(block_size=6)
    folder = write_random_draft(tmp_path / "source", dialect="angelspec", config=config)
    content = config_content(config, "angelspec")
    del content["block_size"]
    write_content(folder, content)

    assert convert(folder, tmp_path / "result", block_size=6) == config


def test_vllm_layer_inputs_are_tapped_one_layer_earlier(tmp_path):
    content = config_content(random_draft_config(taps=(1, 3, 5)), "vllm")
    del content["dflare_config"]["target_layer_ids"]
    content["eagle_aux_hidden_state_layer_ids"] = [2, 4, 6]

    assert read_config(write_content(tmp_path, content)).target_layer_ids == (1, 3, 5)


@pytest.mark.parametrize("architecture", ["DFlareQwen3Model", "DFlareQwen3ForCausalLM"])
def test_vllm_checkpoints_may_use_angelspecs_names(tmp_path, architecture):
    config = random_draft_config()
    folder = write_random_draft(tmp_path / "source", dialect="angelspec", config=config)
    content = config_content(config, "angelspec") | {"architectures": [architecture]}
    del content["model_arch"]
    write_content(folder, content)

    assert convert(folder, tmp_path / "result") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["DFlashDraftModel"]}, "serve it with --speculative-algorithm DFLASH"),
        (
            {"architectures": ["QwenDFlashDraftModel"]},
            "serve it with --speculative-algorithm DFLASH",
        ),
        (
            {"architectures": ["DFlashDraftModel"], "model_arch": "dfly"},
            "`model_arch` is 'dfly', expected \"dflare\"",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, r"`architectures` is \['LlamaForCausalLM'\]"),
        ({"architectures": None}, "`architectures` is None, expected one of QwenDFlareDraftModel"),
        (
            {"architectures": ["DFlareDraftModel"], "speculators_model_type": "dflare"},
            "vllm-project/speculators",
        ),
    ],
)
def test_other_drafters_are_named_for_what_they_are(tmp_path, change, message):
    content = random_draft_config().to_dict() | change
    with pytest.raises(CheckpointError, match=message):
        read_config(write_content(tmp_path, content))


def test_convert_refuses_its_own_source_and_an_existing_checkpoint(tmp_path):
    source = write_random_draft(tmp_path / "source", dialect="vllm")
    other = write_random_draft(tmp_path / "other", seed=1)

    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(source, source, force=True)
    with pytest.raises(CheckpointError, match=r"holds a checkpoint already.*--force"):
        convert(source, other)
    convert(source, other, force=True)
    assert torch.equal(
        load_file(other / "model.safetensors")["norm.weight"],
        load_file(source / "model.safetensors")["model.norm.weight"],
    )
