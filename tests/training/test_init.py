"""Starting from the target's layers: the drafter computes with them what the target does."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_causal_lm

from dflare.training.config import DrafterSection, load_config
from dflare.training.init import build_drafter, draft_config
from dflare.training.pipeline import load_pipeline
from dflare.training.target import Target


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
        for other in (pipeline.synth.openers, pipeline.evaluate.questions):
            assert (root / "demo" / other).exists()
        # What is measured must not have been learned.
        assert pipeline.evaluate.questions in pipeline.synth.exclude
