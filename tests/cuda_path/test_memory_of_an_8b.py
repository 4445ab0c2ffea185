"""Qwen3-8B and the published drafter's sizes on a device of 141 GB: memory is counted, not touched.

SGLang loads, sizes its pools and captures all graphs as on a GPU; no kernel runs on the weights.
"""

import json
import re
from pathlib import Path

import pytest
from checkpoints import byte_tokenizer, random_draft_config
from scheduler_process import running_scheduler

from dflare.checkpoint import expected_tensors

pytestmark = [pytest.mark.slow, pytest.mark.long]

MEMORY_GB = 141  # of an H200
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
}
TAPS = (1, 5, 9, 13, 17, 21, 25, 29, 33)
MASK = 151669
# SGLang collects the taps of a prefill, 8192 tokens at most, and then concatenates them.
PREFILL_TAPS = 8192 * len(TAPS) * SIZES["hidden_size"] * 2
WIDTHS = [1, 2, 3, 4, 6, 8, 12, 16]
# What SGLang chooses for itself.
OWN = {"max_total_tokens": None, "cuda_graph_bs_decode": None, "load_format": "dummy"}


def write_target(folder: Path) -> Path:
    from transformers import Qwen3Config

    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(**SIZES, num_hidden_layers=36, rope_parameters=rope, dtype="bfloat16")
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_drafter(folder: Path) -> Path:
    """The sizes of AngelSlim/Qwen3-8b-dflare."""
    folder.mkdir()
    config = random_draft_config(
        hidden_size=SIZES["hidden_size"],
        intermediate_size=SIZES["intermediate_size"],
        num_layers=7,
        num_heads=SIZES["num_attention_heads"],
        num_kv_heads=SIZES["num_key_value_heads"],
        head_dim=SIZES["head_dim"],
        num_target_layers=36,
        taps=TAPS,
        block_size=16,
        mask_token_id=MASK,
        vocab_size=SIZES["vocab_size"],
        dtype="bfloat16",
        max_position_embeddings=SIZES["max_position_embeddings"],
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    write_zeros(folder / "model.safetensors", expected_tensors(config))
    return folder


def write_zeros(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, size = end, 2
        for n in shape:
            size *= n
        end = begin + size
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(out.tell() + end)


def write_dflash_drafter(folder: Path) -> Path:
    """The sizes of z-lab/Qwen3-8B-DFlash-b16: five layers, five taps."""
    folder.mkdir()
    config = SIZES | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": 5,
        "num_target_layers": 36,
        "block_size": 16,
        "rope_theta": 1e6,
        "dtype": "bfloat16",
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [1, 9, 17, 25, 33]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("qwen3-8b")
    return write_target(folder / "target"), write_drafter(folder / "drafter")


def test_48_requests_need_no_more_than_dflash(pair, tmp_path):
    """48 is what SGLang allows a speculative server by default."""
    settings = OWN | {"max_running_requests": 48, "memory_gb": MEMORY_GB}
    with running_scheduler(*pair, widths=WIDTHS, **settings) as scheduler:
        ours = scheduler.call("graphs")
        assert "which are left out" not in scheduler.log()
    drafter = write_dflash_drafter(tmp_path / "drafter")
    dflash = settings | {"speculative_algorithm": "DFLASH"}
    with running_scheduler(pair[0], drafter, **dflash) as scheduler:
        theirs = scheduler.call("graphs")
    print(ours, theirs)
    assert ours["graphs"] <= 150
    assert 0 < ours["tap_bytes"] <= 1.2 * theirs["tap_bytes"]
    assert ours["free_bytes"] > 2 * PREFILL_TAPS


def test_256_requests_start_and_say_which_widths_are_left_out(pair):
    settings = OWN | {"max_running_requests": 256, "memory_gb": MEMORY_GB}
    with running_scheduler(*pair, widths=WIDTHS, **settings) as scheduler:
        ours, served = scheduler.call("graphs"), scheduler.call("widths")
        said = re.search(r"no CUDA graphs for verify widths ([\d, ]+), which are", scheduler.log())
    print(ours, served, said)
    left_out = [int(width) for width in said[1].split(",")] if said else []
    assert sorted(served + left_out) == WIDTHS
    assert len(served) > 1, "it still drafts"
    assert ours["free_bytes"] > 2 * PREFILL_TAPS
