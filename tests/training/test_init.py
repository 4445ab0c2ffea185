"""Starting from the target's layers: the drafter computes with them what the target does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_random_draft
from tiny_models import tiny_causal_lm
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
)

from dflare.training.data.target import Target
from dflare.training.drafter.export import export_drafter, load_drafter
from dflare.training.drafter.init import build_drafter, draft_config, start_fusion, tap_sizes
from dflare.training.errors import ConfigError
from dflare.training.run.config import DrafterSection, load_config
from dflare.training.run.pipeline import load_pipeline


def section(**changes) -> DrafterSection:
    values = {"layers": 2, "taps": (0, 1, 2), "block_size": 4, "mask_token_id": 3}
    return DrafterSection(**{**values, **changes})


@pytest.fixture(scope="module")
def target():
    model = tiny_causal_lm()
    with torch.no_grad():
        for layer in model.model.layers:  # fresh models have all norms at 1
            layer.input_layernorm.weight.uniform_(0.5, 1.5)
            layer.post_attention_layernorm.weight.uniform_(0.5, 1.5)
    return Target(model, (0, 1, 2))


def test_sizes_come_from_the_target(target):
    config = draft_config(section(intermediate_size=40), target)
    assert (config.hidden_size, config.vocab_size, config.num_target_layers) == (32, 64, 4)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.intermediate_size == 40 and config.rope.theta == 10000.0
    assert draft_config(section(), target).intermediate_size == 64


def test_taps_may_be_spread(target):
    assert draft_config(section(taps=1), target).target_layer_ids == (2,)


def test_layers_are_the_last_of_the_target_unless_named(target):
    for chosen, layers in ((None, (2, 3)), ((0, 3), (0, 3))):
        drafter = build_drafter(section(init_layers=chosen), target, seed=0)
        for d, layer in enumerate(layers):
            old = target.decoder.layers[layer]
            assert torch.equal(
                drafter.layer(d).self_attn.q_proj.weight, old.self_attn.q_proj.weight
            )


def test_fusion_starts_from_each_layers_own_input_whatever_the_sizes_of_the_taps(target):
    """A tap whose states are three times as large as another's has no more voice than it."""
    ids = [np.arange(3, 40), np.arange(8, 20)]
    drafter = build_drafter(section(), target, seed=0)
    start_fusion(drafter, (1, 3), tap_sizes(target, ids))
    states = target.read(torch.from_numpy(ids[0])[None]).taps.unflatten(-1, (3, -1))
    sizes = states.square().mean(-1).sqrt().median(1).values[0]
    voice = drafter.layer_fusion_weights.detach().softmax(-1) * sizes
    favoured = torch.tensor([0, 2])  # the outputs of layers 0 and 2, which layers 1 and 3 read
    for shares, tap in zip(voice / voice.sum(-1, keepdim=True), favoured, strict=True):
        others = shares[torch.arange(3) != tap]
        assert shares.argmax() == tap
        torch.testing.assert_close(others[0], others[1], rtol=0.15, atol=0)
        assert shares[tap] / others.mean() == pytest.approx(np.e**2, rel=0.15)


def test_context_projections_see_what_the_target_layer_sees(target):
    drafter = build_drafter(section(), target, seed=0)
    states = torch.randn(5, 32)
    old, new = target.decoder.layers[2], drafter.layer(0).self_attn
    for name in ("k_proj", "v_proj"):
        expected = getattr(old.self_attn, name)(old.input_layernorm(states))
        got = getattr(new, f"{name}_target")(drafter.hidden_norm(states))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_feed_forward_of_full_width_is_the_targets(target):
    drafter = build_drafter(section(), target, seed=0)
    states = torch.randn(5, 32)
    torch.testing.assert_close(drafter.layer(1).mlp(states), target.decoder.layers[3].mlp(states))


def test_a_narrow_feed_forward_keeps_the_strongest_neurons(target):
    old = target.decoder.layers[3].mlp
    strength = old.gate_proj.weight.norm(dim=1) * old.up_proj.weight.norm(dim=1)
    strength = strength * old.down_proj.weight.norm(dim=0)
    kept = build_drafter(section(intermediate_size=8), target, seed=0).layer(1).mlp
    best = strength.topk(8).indices.sort().values
    assert torch.equal(kept.gate_proj.weight, old.gate_proj.weight[best])
    assert torch.equal(kept.down_proj.weight, old.down_proj.weight[:, best])


def test_dflash_starts_at_the_mean_of_the_taps(target):
    drafter = build_drafter(section(architecture="dflash"), target, seed=0)
    taps = torch.randn(5, 96)
    expected = taps.unflatten(-1, (3, 32)).mean(1)
    torch.testing.assert_close(drafter.fc(taps), expected, atol=1e-6, rtol=1e-5)


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GEMMA = GemmaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8)
NEOX = GPTNeoXConfig(**SMALL, intermediate_size=48, bos_token_id=1, eos_token_id=2)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        (GPT2, "GPT2Model does not keep its layers in `layers`"),
        (NEOX, "gpt_neox.* has no num_key_value_heads, rms_norm_eps"),
        (GEMMA, r"layers\.2\.input_layernorm .GemmaRMSNorm.*drafter\.init=random"),
    ],
)
def test_a_target_of_another_kind_is_refused_with_what_it_lacks(config, hint):
    with pytest.raises(ConfigError, match=hint):
        build_drafter(section(), Target(AutoModelForCausalLM.from_config(config), (0, 1, 2)), 0)


def test_a_feed_forward_with_another_activation_is_not_copied():
    gelu = Target(tiny_causal_lm(hidden_act="gelu"), (0, 1, 2))
    with pytest.raises(ConfigError, match=r"GELUActivation.*drafter\.init=random"):
        build_drafter(section(), gelu, 0)
    assert build_drafter(section(init="random"), gelu, 0).config.hidden_size == 32


def test_a_target_with_other_norms_may_be_started_randomly():
    gemma = Target(AutoModelForCausalLM.from_config(GEMMA), (0, 1, 2))
    config = build_drafter(section(init="random"), gemma, 0).config
    assert (config.num_key_value_heads, config.intermediate_size) == (2, 48)


def test_rope_comes_from_the_layers_of_the_drafters_kind():
    kinds = {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
    }
    shared = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    config = Gemma3TextConfig(**SMALL, **shared, rope_parameters=kinds)
    gemma = Target(AutoModelForCausalLM.from_config(config), (0, 1, 2))
    for window, theta in ((None, 1e6), (16, 1e4)):
        assert draft_config(section(sliding_window=window), gemma).rope.theta == theta


@pytest.mark.parametrize("dialect", ["angelslim", "angelspec"])
def test_training_goes_on_from_a_drafter_with_a_larger_block(target, tmp_path, dialect):
    config = draft_config(section(intermediate_size=40), target)
    write_random_draft(tmp_path, config=config, dialect=dialect)
    drafter = build_drafter(
        section(intermediate_size=40, block_size=8, init=str(tmp_path)), target, 0
    )
    given = load_drafter(tmp_path)
    assert (given.config.block_size, drafter.config.block_size) == (4, 8)
    assert drafter.state_dict().keys() == given.state_dict().keys()
    for name, value in given.state_dict().items():
        assert torch.equal(drafter.state_dict()[name], value), name


def test_a_drafter_keeps_the_tokens_that_it_drafts(target, tmp_path):
    config = draft_config(section(), target).model_copy(update={"draft_vocab_size": 20})
    write_random_draft(tmp_path / "draft", config=config)
    drafter = build_drafter(section(init=str(tmp_path / "draft")), target, 0)
    again = load_drafter(export_drafter(drafter, drafter.state_dict(), tmp_path / "again"))
    assert len(again.draft_ids) == 20
    assert torch.equal(again.draft_ids, load_drafter(tmp_path / "draft").draft_ids)


def test_a_drafter_that_computes_something_else_is_refused_by_what_differs(target, tmp_path):
    write_random_draft(tmp_path, config=draft_config(section(intermediate_size=40), target))
    wanted = section(taps=(0, 1), architecture="dflash", init=str(tmp_path))
    with pytest.raises(ConfigError) as error:
        build_drafter(wanted, target, 0)
    for text in (
        "intermediate_size is 64 and 40 in the checkpoint",
        "target_layer_ids is (0, 1) and (0, 1, 2) in the checkpoint",
        "architecture is 'dflash' and 'dflare' in the checkpoint",
    ):
        assert text in str(error.value)
    assert "block_size" not in str(error.value)


def test_random_starts_depend_on_the_seed_alone(target):
    torch.manual_seed(5)
    first = build_drafter(section(init="random"), target, seed=1).state_dict()
    torch.manual_seed(6)
    same = build_drafter(section(init="random"), target, seed=1).state_dict()
    other = build_drafter(section(init="random"), target, seed=2).state_dict()
    name = "layers.0.self_attn.q_proj.weight"
    assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])


def test_the_shipped_configurations_are_sound():
    root = Path(__file__).parents[2] / "configs"
    for file in [*root.glob("*.yaml"), *root.glob("demo/*-train.yaml")]:
        assert load_config(file).drafter.layers > 0
    for name in ("cpu", "gpu"):
        pipeline = load_pipeline(root / f"demo/{name}.yaml")
        assert (root / "demo" / pipeline.train).exists()
        for other in (pipeline.synth.openers, *pipeline.evaluate.prompts):
            assert (root / "demo" / other).exists()
        # What is measured must not have been learned.
        assert set(pipeline.evaluate.prompts) <= set(pipeline.synth.exclude)
