"""Whatever is wrong with a pair or a flag, the user reads one clear line before anything loads."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoints import random_draft_config, random_tensors, write_random_draft, write_random_target
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dflare.apps.launch import check_before_start, read_prompts, resolve_pair
from dflare.engine import version
from dflare.errors import CheckpointError, DFlareError, UnsupportedError


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_random_target(tmp_path_factory.mktemp("bad") / "target")


@pytest.fixture
def draft(tmp_path):
    return write_random_draft(tmp_path / "draft")


def edit_config(draft, **changes):
    file = draft / "config.json"
    content = json.loads(file.read_text())
    nested = changes.pop("dflash_config", {})
    content["dflash_config"].update(nested)
    content.update(changes)
    file.write_text(json.dumps(content))


def edit_weights(draft, change):
    file = draft / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def truncate(draft):
    file = draft / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def add_nan(weights):
    weights["layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def make_dflash(draft):
    edit_config(draft, architectures=["DFlashDraftModel"])


BAD_DRAFTS = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["safetensors", "fetch it again"]),
    "truncated": (truncate, ["cut short"]),
    "unknown tensor": (
        lambda d: edit_weights(d, lambda w: w.update(surprise=torch.zeros(2))),
        ["unknown tensors", "surprise"],
    ),
    "missing tensor": (
        lambda d: edit_weights(d, lambda w: w.pop("layers.0.self_attn.k_proj_target.weight")),
        ["missing tensors", "layers.0.self_attn.k_proj_target.weight"],
    ),
    "wrong shape": (
        lambda d: edit_weights(d, lambda w: w.update({"norm.weight": torch.ones(63)})),
        ["norm.weight", "[63]", "[64]"],
    ),
    "tap beyond target": (
        lambda d: edit_config(d, dflash_config={"target_layer_ids": [1, 3, 99]}),
        ["target_layer_ids", "99"],
    ),
    "D contradicts weights": (
        lambda d: edit_config(d, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        ["num_hidden_layers", "3", "2 layers"],
    ),
    "T contradicts weights": (
        lambda d: edit_config(d, dflash_config={"target_layer_ids": [1, 3]}),
        ["layer_fusion_weights", "T = 2"],
    ),
    "mask token outside": (
        lambda d: edit_config(d, dflash_config={"mask_token_id": 4096}),
        ["mask_token_id", "4096"],
    ),
    "block size 0": (lambda d: edit_config(d, block_size=0), ["block_size", "0", "2 to 32"]),
    "block size 64": (lambda d: edit_config(d, block_size=64), ["block_size", "64", "2 to 32"]),
    "NaN": (lambda d: edit_weights(d, add_nan), ["NaN", "layers.1.mlp.up_proj.weight"]),
    "DFlash": (make_dflash, ["DFlash", "--speculative-algorithm DFLASH"]),
}


@pytest.mark.parametrize("case", BAD_DRAFTS)
def test_bad_drafter(target, draft, case):
    damage, words = BAD_DRAFTS[case]
    damage(draft)
    with pytest.raises(CheckpointError) as caught:
        check_before_start(str(target), str(draft))
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_wrong_hidden_size(target, tmp_path):
    draft = write_random_draft(tmp_path / "draft", hidden_size=96)
    with pytest.raises(CheckpointError, match=r"96.*64"):
        check_before_start(str(target), str(draft))


def test_drafter_that_does_not_exist(target):
    with pytest.raises(CheckpointError, match="no such folder"):
        check_before_start(str(target), "/does/not/exist")


def test_only_half_a_pair():
    with pytest.raises(CheckpointError, match="--draft"):
        resolve_pair("target", None)
    with pytest.raises(CheckpointError, match="--demo"):
        resolve_pair("target", "draft", demo=True)


@pytest.mark.parametrize("value", [0, 1, 33])
def test_verify_width_flag(value):
    from dflare.engine.pair import _check_block_size

    arguments = SimpleNamespace(
        speculative_num_draft_tokens=value, speculative_dflash_block_size=None
    )
    with pytest.raises(UnsupportedError, match=rf"is {value}, expected 2 to 32"):
        _check_block_size(arguments, random_draft_config())


@pytest.mark.parametrize("algorithm", ["NGRAM", "ngram", "EAGLE3"])
def test_speculation_that_does_not_run_on_a_cpu(algorithm):
    from dflare.cpu.platform import CpuPlatform

    arguments = SimpleNamespace(speculative_algorithm=algorithm)
    with pytest.raises(ValueError, match=rf"is {algorithm}; .* DFLARE and DFLASH run: choose one"):
        CpuPlatform().apply_server_args_defaults(arguments)


def test_a_tree_of_drafts_is_not_verified_as_a_block():
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from dflare.cpu.attention import CpuAttentionBackend

    runner = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=None), token_to_kv_pool=None
    )
    mask = torch.ones(4, dtype=torch.bool)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=1,
        seq_lens=torch.tensor([2]),
        spec_info=SimpleNamespace(draft_token_num=2, custom_mask=mask),
    )
    backend = CpuAttentionBackend(runner)
    with pytest.raises(NotImplementedError, match="tree of drafts"):
        backend.init_forward_metadata(batch)
    batch.spec_info.custom_mask = None
    backend.init_forward_metadata(batch)


def test_untested_sglang(monkeypatch):
    monkeypatch.delenv(version.OVERRIDE_ENV, raising=False)
    with pytest.raises(UnsupportedError) as caught:
        version.check_sglang_version("9.9.9")
    assert "9.9.9" in str(caught.value) and "0.5.23" in str(caught.value)
    assert version.OVERRIDE_ENV in str(caught.value)
    monkeypatch.setenv(version.OVERRIDE_ENV, "1")
    version.check_sglang_version("9.9.9")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", ["line 1", "0xff", "not UTF-8"]),
        (b"", ["no prompt"]),
        (b"{not json}\n", ["line 1", "not JSON"]),
        (b'{"text": "hello"}\n', ["line 1", "messages", "prompt"]),
        (b'{"prompt": "fine"}\n{"messages": "hello"}\n', ["line 2"]),
        (b'{"prompt": ""}\n', ["line 1", "empty"]),
    ],
)
def test_prompts_file(target, tmp_path, content, words):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(DFlareError) as caught:
        read_prompts(file, AutoTokenizer.from_pretrained(target))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_prompts_file_missing(target, tmp_path):
    with pytest.raises(DFlareError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl", AutoTokenizer.from_pretrained(target))


def test_command_line_prints_one_line_and_fails(target, draft):
    truncate(draft)
    command = [sys.executable, "-m", "dflare.cli", "serve"]
    run = subprocess.run(
        [*command, "--model-path", target, "--draft", draft],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("dflare: ") and "cut short" in lines[-1]
    assert "Traceback" not in run.stderr


def test_random_tensors_are_what_the_config_expects(target, draft):
    """The undamaged pair passes, so that the tests above fail for their own reasons."""
    assert random_tensors(random_draft_config(), seed=1)
    check_before_start(str(target), str(draft))
