"""config.json is read strictly: what makes no sense is refused with key, value and a way out."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import random_draft_config
from transformers import Qwen3Config

from dflare.checkpoint import find_folder, make_config, read_config, spread_taps
from dflare.errors import CheckpointError


def write(folder: Path, content: object) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def content_with(**changes: object) -> dict:
    """A sound config.json with some keys changed, or removed where the value is ..."""
    content = random_draft_config(num_layers=2, num_target_layers=8, taps=(1, 3, 5)).to_dict()
    for key, value in changes.items():
        holder = content
        if key in ("mask_token_id", "target_layer_ids"):
            holder = content["dflash_config"]
        if value is ...:
            del holder[key]
        else:
            holder[key] = value
    return content


BAD_VALUES = [
    ({"block_size": 0}, "`block_size` is 0, expected an integer from 2 to 32"),
    ({"block_size": 1}, "`block_size` is 1, expected an integer from 2 to 32"),
    ({"block_size": 33}, "`block_size` is 33, expected an integer from 2 to 32"),
    ({"block_size": "8"}, "`block_size` is '8', expected an integer from 2 to 32"),
    ({"block_size": ...}, "`block_size` is missing, expected an integer from 2 to 32"),
    ({"hidden_size": -64}, "`hidden_size` is -64, expected a positive integer"),
    ({"hidden_size": None}, "`hidden_size` is None, expected a positive integer"),
    ({"hidden_size": 64.5}, "`hidden_size` is 64.5, expected a positive integer"),
    ({"num_hidden_layers": True}, "`num_hidden_layers` is True, expected a positive integer"),
    ({"head_dim": 15}, "`head_dim` is 15, expected a positive even integer"),
    ({"head_dim": ...}, "`head_dim` is missing"),
    ({"num_key_value_heads": 3}, "`num_attention_heads` is 4, expected a multiple of"),
    ({"rms_norm_eps": 0}, "`rms_norm_eps` is 0, expected a number between 0 and 1"),
    ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu', expected silu"),
    ({"mask_token_id": ...}, "`dflash_config.mask_token_id` is missing"),
    ({"mask_token_id": -1}, "`dflash_config.mask_token_id` is -1, expected a token id"),
    (
        {"mask_token_id": 512},
        "`dflash_config.mask_token_id` is 512, expected an id below `vocab_size` = 512",
    ),
    ({"target_layer_ids": []}, "`dflash_config.target_layer_ids` is (), expected a non-empty"),
    (
        {"target_layer_ids": "1,3"},
        "`dflash_config.target_layer_ids` is '1,3', expected a non-empty",
    ),
    ({"target_layer_ids": [1, "3"]}, "`dflash_config.target_layer_ids[1]` is '3', expected"),
    ({"target_layer_ids": [3, 1]}, "`dflash_config.target_layer_ids` is [3, 1], expected ids that"),
    ({"target_layer_ids": [1, 1]}, "expected ids that increase"),
    ({"target_layer_ids": [1, 8]}, "is [1, 8], expected ids from 0 to 6, as `num_target_layers`"),
    ({"target_layer_ids": [1, 7]}, "the last layer cannot be tapped"),
    ({"target_layer_ids": [-1, 3]}, "is [-1, 3], expected ids from 0 to 6"),
    ({"num_target_layers": ...}, "`num_target_layers` is missing"),
    ({"layer_types": ["full_attention"]}, "`layer_types` has 1 entries, expected"),
    ({"layer_types": 5}, "`layer_types` is 5, expected one of full_attention"),
    (
        {"layer_types": ["full_attention", "linear_attention"]},
        "`layer_types[1]` is 'linear_attention', expected one of full_attention",
    ),
    (
        {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True},
        "`sliding_window` is null, expected a positive integer",
    ),
    (
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8},
        "`use_sliding_window` is false and `layer_types` has sliding_attention",
    ),
    (
        {"layer_types": ..., "use_sliding_window": True, "sliding_window": 8},
        "`use_sliding_window` is true and `layer_types` is missing",
    ),
    ({"torch_dtype": "float8_e4m3fn"}, "`dtype` is 'float8_e4m3fn', expected bfloat16, float16"),
    ({"torch_dtype": ...}, "`torch_dtype` is missing"),
    ({"dtype": "bfloat16"}, "`torch_dtype` is 'float32' and `dtype` is 'bfloat16'"),
    ({"rope_theta": ...}, "`rope_theta` is missing, expected a number above 0"),
    ({"rope_theta": -1.0}, "`theta` is -1.0, expected a number above 0"),
    ({"rope_scaling": "yarn"}, "`rope_scaling` is 'yarn', expected an object or null"),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "`type` is 'dynamic', expected default, linear, yarn or llama3",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        "`rope_theta` is 10000.0 and `rope_parameters.rope_theta` is 5.0",
    ),
    ({"partial_rotary_factor": 0.01}, "`partial_rotary_factor` is 0.01, expected one that turns"),
    ({"quantization_config": {"quant_method": "fp8"}}, "`quantization_config` is"),
    ({"draft_vocab_size": 513}, "`draft_vocab_size` is 513, expected at most `vocab_size` = 512"),
    ({"draft_vocab_size": 0}, "`draft_vocab_size` is 0, expected a positive integer"),
    ({"target_hidden_size": 128}, "`target_hidden_size` is 128, expected `hidden_size` = 64"),
    ({"dflash_config": [1]}, "`dflash_config` is [1], expected an object"),
    (
        {"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1], "markov_rank": 4}},
        "`dflash_config.markov_rank` is 4, a setting that DFlare does not have",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES, ids=lambda v: str(v)[:40])
def test_a_bad_value_is_refused_by_name(tmp_path, changes, message):
    write(tmp_path, content_with(**changes))
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    text = str(error.value)
    assert text.startswith(str(tmp_path / "config.json"))
    assert message in text
    assert "\n" not in text, "one problem is one line"


def test_all_problems_come_in_one_message(tmp_path):
    write(tmp_path, content_with(block_size=0, hidden_size="wide", head_dim=...))
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    text = str(error.value)
    assert text.splitlines()[0].endswith("3 problems")
    assert all(f"`{key}`" in text for key in ("block_size", "hidden_size", "head_dim"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "holds list, expected a JSON object"), ("\xff", "cannot be")],
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_a_path_that_leads_nowhere_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder; give a folder"):
        find_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="this is a file, expected a folder"):
        find_folder(file)


def test_scaling_is_read_alike_from_transformers_4_and_5(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    old = write(tmp_path, content_with(rope_scaling=scaling))
    first = read_config(old)
    new = write(
        tmp_path,
        content_with(
            rope_theta=..., rope_scaling=..., rope_parameters={"rope_theta": 10000.0, **scaling}
        ),
    )
    oldest = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    assert read_config(new) == first
    assert read_config(write(tmp_path, content_with(rope_scaling=oldest))) == first
    assert first.rope.theta == 10000.0
    assert first.rope.scaling == scaling


def test_transformers_understands_what_we_write():
    config = random_draft_config(
        num_layers=2,
        layer_types=("full_attention", "sliding_attention"),
        sliding_window=128,
        rope={"theta": 1e6, "type": "linear", "parameters": {"factor": 2.0}},
        dtype="bfloat16",
    )
    theirs = Qwen3Config(**config.to_dict())

    assert theirs.rope_parameters == {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}
    assert theirs.layer_types == list(config.layer_types)
    assert theirs.sliding_window == 128
    assert theirs.dtype == torch.bfloat16
    assert theirs.head_dim == config.head_dim


def test_a_window_counts_the_query_in_config_and_not_in_the_ops():
    config = random_draft_config(
        num_layers=2, layer_types=("full_attention", "sliding_attention"), sliding_window=128
    )
    assert [config.window(0), config.window(1)] == [-1, 127]


def test_default_taps_are_those_of_the_published_drafters(tmp_path):
    assert spread_taps(36, 9) == (1, 5, 9, 13, 17, 21, 25, 29, 33)
    assert spread_taps(36, 1) == (18,)
    with pytest.raises(CheckpointError, match="choose fewer taps"):
        spread_taps(8, 7)
    # AngelSlim takes as many taps as there are draft layers where config.json names none.
    content = content_with(target_layer_ids=...)
    assert read_config(write(tmp_path, content)).target_layer_ids == spread_taps(8, 2)


def test_values_from_elsewhere_are_checked_alike():
    good = random_draft_config()
    values = good.model_dump()
    assert make_config(values, "train.yaml") == good
    with pytest.raises(CheckpointError, match=r"^train\.yaml: `block_size` is 64"):
        make_config({**values, "block_size": 64}, "train.yaml")
    with pytest.raises(CheckpointError, match="`depth` is not a setting of a DFlare drafter"):
        make_config({**values, "depth": 1}, "train.yaml")


def test_sliding_layers_are_spoken_of():
    """They are served as SGLang serves them, and most are trained otherwise."""
    assert random_draft_config().sliding_note() is None
    slides = random_draft_config(
        num_layers=2, layer_types=("sliding_attention", "full_attention"), sliding_window=16
    )
    note = slides.sliding_note()
    assert "1 of 2 layers" in note and "16 tokens" in note and "layer_types" in note
