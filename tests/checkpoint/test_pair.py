"""A drafter belongs to one target; what does not match is told with both values."""

import json

import pytest
from checkpoints import random_draft_config, write_random_draft, write_random_target
from transformers import AutoConfig, DeepseekV3Config, GptOssConfig, LlamaConfig, Qwen3Config, Qwen3NextConfig

from dflare.checkpoint import check_pair, pair_checks, target_kv_bytes_per_token
from dflare.errors import CheckpointError


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_random_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def draft_folder(tmp_path):
    return write_random_draft(tmp_path / "draft")


def small_target(**changes):
    values = {
        "hidden_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return LlamaConfig(**{**values, **changes})


def test_a_pair_that_fits_passes_as_folder_and_as_configuration(target, draft_folder):
    config = random_draft_config()
    check_pair(config, target, draft_folder)
    check_pair(config, str(target))
    check_pair(config, AutoConfig.from_pretrained(target))
    assert all(check.status == "ok" for check in pair_checks(config, target))


def test_gpt_oss_fits_a_drafter_of_its_shape():
    """Not a Qwen: hidden size 2880, heads that do not add up to it, sliding layers, biases."""
    target = GptOssConfig(num_hidden_layers=24)
    draft = random_draft_config(
        hidden_size=target.hidden_size,
        num_layers=4,
        num_heads=target.num_attention_heads,
        num_kv_heads=target.num_key_value_heads,
        head_dim=target.head_dim,
        num_target_layers=target.num_hidden_layers,
        vocab_size=target.vocab_size,
        max_position_embeddings=target.max_position_embeddings,
        attention_bias=True,
        layer_types=("sliding_attention", "full_attention") * 2,
        sliding_window=128,
    )
    assert [c.name for c in pair_checks(draft, target) if c.status == "failed"] == []
    with pytest.raises(CheckpointError, match="target layers: .* 36 and the target's is 24"):
        check_pair(random_draft_config(hidden_size=2880, num_target_layers=36), target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128}, "hidden size: the drafter's is 64 and the target's is 128"),
        ({"vocab_size": 500}, "vocabulary: the drafter's is 512 and the target's is 500"),
        ({"num_hidden_layers": 9}, "target layers: the drafter's is 8 and the target's is 9"),
    ],
)
def test_a_mismatch_is_told_with_both_values(changes, message):
    with pytest.raises(CheckpointError) as error:
        check_pair(random_draft_config(), small_target(**changes))
    assert message in str(error.value)
    assert "use the target that the drafter was trained for" in str(error.value)
    assert "\n" not in str(error.value)


def test_taps_and_mask_token_beyond_the_target_are_told():
    draft = random_draft_config(num_target_layers=40, taps=(1, 20), mask_token_id=400)
    with pytest.raises(CheckpointError) as error:
        check_pair(draft, small_target(vocab_size=300))
    text = str(error.value)
    assert (
        "taps: the drafter taps layers [1, 20] and the target has 8, expected ids below 7" in text
    )
    assert "mask token: the drafter's is 400 and the target has 300 tokens" in text


def test_what_may_be_intended_is_a_note():
    target = small_target(
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    draft = random_draft_config()
    check_pair(draft, target)
    notes = {c.name: c.detail for c in pair_checks(draft, target) if c.status == "note"}
    assert notes.keys() == {"positions", "rope"}
    assert "4096" in notes["positions"]
    assert "8192" in notes["positions"]
    assert "--context-length" in notes["positions"]


def tokenizer_check(draft_folder, target):
    checks = pair_checks(random_draft_config(), target, draft_folder)
    return next(check for check in checks if check.name == "tokenizer")


def test_tokenizers_are_compared_token_by_token(target, draft_folder):
    assert tokenizer_check(draft_folder, target).status == "note"

    content = json.loads((target / "tokenizer.json").read_text())
    (draft_folder / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_check(draft_folder, target).status == "ok"

    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (draft_folder / "tokenizer.json").write_text(json.dumps(content))
    check = tokenizer_check(draft_folder, target)
    assert check.status == "failed"
    assert "2 tokens differ" in check.detail
    with pytest.raises(CheckpointError, match="tokenizer: 2 tokens differ"):
        check_pair(random_draft_config(), target, draft_folder)


@pytest.mark.parametrize(("end_of_text", "status"), [(2, "ok"), (151645, "note")])
def test_without_a_tokenizer_end_of_text_tells_the_family(
    target, draft_folder, end_of_text, status
):
    file = draft_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": end_of_text}))
    check = tokenizer_check(draft_folder, target)
    assert check.status == status
    assert str(end_of_text) in check.detail


def test_a_target_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        check_pair(random_draft_config(), tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        check_pair(random_draft_config(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "from_the_future"}')
    with pytest.raises(CheckpointError, match=r"cannot read this target.*update transformers"):
        check_pair(random_draft_config(), tmp_path)


def test_a_text_model_inside_a_larger_one_is_what_counts():
    class Outer:
        def get_text_config(self):
            return small_target()

    check_pair(random_draft_config(), Outer())


def test_kv_bytes_count_the_layers_that_have_a_cache():
    # Qwen3-8B: 147,456 bytes in bf16.
    qwen = {"num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128}
    assert target_kv_bytes_per_token(Qwen3Config(**qwen)) == 147_456
    assert target_kv_bytes_per_token(Qwen3Config(**qwen, dtype="float32")) == 2 * 147_456
    types = ["linear_attention"] * 27 + ["full_attention"] * 9
    assert target_kv_bytes_per_token(Qwen3NextConfig(**qwen, layer_types=types)) == 147_456 // 4
    assert target_kv_bytes_per_token(DeepseekV3Config()) is None
