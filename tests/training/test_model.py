"""The drafter: who influences whom, and that many blocks at once equal one block at a time."""

import pytest
import torch
from tiny_models import random_drafter, tiny_draft_config

from dflare.checkpoint import expected_tensors
from dflare.training.drafter.block_mask import dense_block_mask, flex_block_mask
from dflare.training.drafter.model import Drafter

ARCHITECTURES = [
    {"architecture": "dflare"},
    {"architecture": "dflare", "shared_kv": True},
    {"architecture": "dflash"},
]
CONTEXT, ANCHORS, B = 12, (2, 5, 9), 4


def blocks(drafter, taps, embeddings):
    """Run three blocks of one sequence; slots 4a .. 4a+3 are block a."""
    config = drafter.config
    anchors = torch.tensor([ANCHORS])
    positions = (anchors[..., None] + torch.arange(B)).flatten(1)
    masks = {
        window: dense_block_mask(anchors, CONTEXT, B, window)
        for window in {config.window(d) for d in range(config.num_hidden_layers)}
    }
    return drafter(taps, embeddings, positions, masks)


def random_inputs(config):
    torch.manual_seed(3)
    taps = torch.randn(1, CONTEXT, config.num_taps * config.hidden_size)
    return taps, torch.randn(1, len(ANCHORS) * B, config.hidden_size)


@pytest.mark.parametrize("options", ARCHITECTURES)
def test_an_anchor_is_blind_to_its_own_and_later_context(options):
    drafter = random_drafter(tiny_draft_config(), **options)
    taps, embeddings = random_inputs(drafter.config)
    before = blocks(drafter, taps, embeddings)
    for block, anchor in enumerate(ANCHORS):
        changed = taps.clone()
        changed[:, anchor:] = torch.randn_like(changed[:, anchor:])
        after = blocks(drafter, changed, embeddings)
        slots = slice(block * B, block * B + B)
        assert torch.equal(before[:, slots], after[:, slots])
        changed[:, anchor - 1] += 1.0
        assert not torch.allclose(blocks(drafter, changed, embeddings)[:, slots], before[:, slots])


@pytest.mark.parametrize("options", ARCHITECTURES)
def test_gradients_reach_earlier_context_and_the_own_block_only(options):
    drafter = random_drafter(tiny_draft_config(), **options)
    taps, embeddings = random_inputs(drafter.config)
    taps.requires_grad_()
    embeddings.requires_grad_()
    hidden = blocks(drafter, taps, embeddings)
    for block, anchor in enumerate(ANCHORS):
        slots = slice(block * B, block * B + B)
        by_taps, by_block = torch.autograd.grad(
            hidden[:, slots].square().sum(), (taps, embeddings), retain_graph=True
        )
        reached = by_taps[0].abs().sum(-1) > 0
        assert reached[:anchor].all() and not reached[anchor:].any()
        reached = by_block[0].abs().sum(-1) > 0
        assert reached[slots].all() and reached.sum() == B


def test_the_first_slot_sees_the_last_of_its_block():
    drafter = random_drafter(tiny_draft_config())
    taps, embeddings = random_inputs(drafter.config)
    before = blocks(drafter, taps, embeddings)
    embeddings[:, B - 1] += 1.0
    assert not torch.allclose(blocks(drafter, taps, embeddings)[:, 0], before[:, 0])


def test_a_sliding_layer_is_causal_in_the_block():
    config = tiny_draft_config(layer_types=("sliding_attention",) * 2, sliding_window=8)
    drafter = random_drafter(config)
    taps, embeddings = random_inputs(config)
    before = blocks(drafter, taps, embeddings)
    embeddings[:, 2] += 1.0
    after = blocks(drafter, taps, embeddings)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2:B], after[:, 2:B])


def test_a_sliding_layer_forgets_context_beyond_its_window():
    config = tiny_draft_config(layer_types=("sliding_attention",) * 2, sliding_window=3)
    drafter = random_drafter(config)
    taps, embeddings = random_inputs(config)
    before = blocks(drafter, taps, embeddings)
    taps[:, : ANCHORS[2] - 2] += 1.0  # the window of the last anchor: itself and two before
    after = blocks(drafter, taps, embeddings)
    assert torch.equal(before[:, 2 * B :], after[:, 2 * B :])
    assert not torch.allclose(before[:, :B], after[:, :B])


@pytest.mark.parametrize("options", ARCHITECTURES)
def test_blocks_trained_together_equal_blocks_drafted_one_by_one(options):
    drafter = random_drafter(tiny_draft_config(), **options)
    taps, embeddings = random_inputs(drafter.config)
    together = blocks(drafter, taps, embeddings)
    for block, anchor in enumerate(ANCHORS):
        slots = slice(block * B, block * B + B)
        context = drafter.context_kv(taps[:, :anchor], torch.arange(anchor)[None])
        positions = torch.arange(anchor, anchor + B)[None]
        alone = drafter.draft(embeddings[:, slots], positions, context, {-1: None})
        torch.testing.assert_close(alone, together[:, slots], atol=1e-5, rtol=1e-5)


def blocks_with(make_mask, drafter, taps, embeddings, anchors):
    slots = torch.arange(drafter.config.block_size, device=taps.device)
    positions = (anchors[..., None] + slots).flatten(1)
    masks = {
        window: make_mask(anchors, taps.shape[1], len(slots), window)
        for window in set(drafter.windows)
    }
    return drafter(taps, embeddings, positions, masks)


MIXED = {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 6}


def test_flex_attention_computes_what_dense_attention_does():
    drafter = random_drafter(tiny_draft_config(**MIXED))
    anchors = torch.tensor([[0, 2, 5, 9], [1, 3, 3, 11]])
    taps, embeddings = torch.randn(2, 12, 96), torch.randn(2, 16, 32)
    with torch.no_grad():  # on a CPU flex attention has no backward pass
        dense, flex = (
            blocks_with(make, drafter, taps, embeddings, anchors)
            for make in (dense_block_mask, flex_block_mask)
        )
    torch.testing.assert_close(dense, flex, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_flex_attention_has_the_gradients_of_dense_attention():
    config = tiny_draft_config(
        hidden_size=256, num_attention_heads=6, num_key_value_heads=2, head_dim=64, **MIXED
    )
    anchors = torch.randint(200, (2, 40), device="cuda").sort().values
    taps = torch.randn(2, 256, 3 * 256, device="cuda")
    embeddings = torch.randn(2, 160, 256, device="cuda")
    results = []
    for make in (dense_block_mask, flex_block_mask):
        drafter = random_drafter(config).cuda()
        if make is flex_block_mask:
            drafter.compile(dynamic=False)
        hidden = blocks_with(make, drafter, taps, embeddings, anchors)
        hidden.square().mean().backward()
        results.append([hidden, *(parameter.grad for parameter in drafter.parameters())])
    for dense, flex in zip(*results, strict=True):
        assert (dense - flex).norm() <= 5e-3 * dense.norm()  # tf32 products in one of them


def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        drafter = random_drafter(tiny_draft_config(), checkpoint_activations=checkpointed)
        blocks(drafter, *random_inputs(drafter.config)).square().mean().backward()
        gradients.append([p.grad for p in drafter.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_parameters_are_those_of_the_checkpoint_format():
    config = tiny_draft_config(attention_bias=True)
    shapes = {name: tuple(p.shape) for name, p in Drafter(config).named_parameters()}
    assert shapes == expected_tensors(config)


def test_fusion_starts_as_the_published_drafters_did():
    layers = ("full_attention",) * 7
    taps = (1, 5, 9, 13, 17, 21, 25, 29, 33)
    config = tiny_draft_config(
        num_hidden_layers=7, layer_types=layers, target_layer_ids=taps, num_target_layers=36
    )
    logits = Drafter(config).layer_fusion_weights
    assert logits.argmax(-1).tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert sorted(set(logits.flatten().tolist())) == [0.0, 2.0]


@pytest.mark.parametrize(
    "rope",
    [
        {"theta": 10000.0, "partial_rotary_factor": 0.5},
        {"theta": 10000.0, "type": "linear", "parameters": {"factor": 4.0}},
        {
            "theta": 500000.0,
            "type": "llama3",
            "parameters": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ],
)
def test_rope_depends_on_the_distance_alone(rope):
    drafter = random_drafter(tiny_draft_config(rope=rope))
    taps, embeddings = random_inputs(drafter.config)
    outputs = []
    for start in (0, 100):
        context = drafter.context_kv(taps, start + torch.arange(CONTEXT)[None])
        positions = start + CONTEXT + torch.arange(B)[None]
        outputs.append(drafter.draft(embeddings[:, :B], positions, context, {-1: None}))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)
