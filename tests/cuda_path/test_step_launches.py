"""What the host launches for a draft and its append, beside SGLang's own DFLASH."""

import json

import pytest
from models import _SIZES, LAYERS, greedy, prompts, write_pair
from scheduler_process import running_scheduler

pytestmark = pytest.mark.slow

BLOCK = 4
TAPS = list(range(LAYERS - 1))


def write_dflash_drafter(folder, target, depth):
    """Of the sizes of `write_pair`'s drafter; weights are SGLang's dummies."""
    folder.mkdir()
    config = json.loads((target / "config.json").read_text())
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = {name: config[name] for name in (*kept, "head_dim", "vocab_size", "rms_norm_eps")}
    config |= {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": depth,
        "num_target_layers": LAYERS,
        "max_position_embeddings": 4096,
        "block_size": BLOCK,
        "rope_theta": 10000.0,
        "dtype": _SIZES["dtype"],
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": TAPS},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def launches(target, draft, **settings):
    """Of a decode step of one request; all steps but the last, which ends it, are alike."""
    with running_scheduler(target, draft, load_format="dummy", **settings) as scheduler:
        scheduler.generate(greedy("warm", prompts(1, 20, 30), 8))
        scheduler.call("count_step_launches")
        scheduler.generate(greedy("counted", prompts(1, 20, 30), 12))
        first, *others = scheduler.call("step_launches")[:-1]
    assert others and all(step == first for step in others)
    return first


@pytest.mark.parametrize("depth", [2, pytest.param(7, marks=pytest.mark.long)])
def test_a_draft_and_its_append_beside_dflash(tmp_path, depth):
    """The table of docs/kernels.md. Dummy weights: what is launched does not depend on values."""
    target, draft = write_pair(tmp_path, num_layers=depth, block_size=BLOCK, taps=tuple(TAPS))
    ours = launches(target, draft)
    dflash = write_dflash_drafter(tmp_path / "dflash", target, depth)
    theirs = launches(target, dflash, speculative_algorithm="DFLASH")
    # A layer: four products, two norms, the gate and block_attention. Then the final norm, the
    # head's product and argmax, and before all the schedule and an event of SGLang's behind it.
    assert ours == {"draft": 9, "nodes": 8 * depth + 5, "append": 2}
    assert theirs == {"draft": 10, "nodes": 11 * depth + 5, "append": 4 + depth}
