"""What was trained is what is served: the training model against the independent reference."""

import pytest
import torch
from checkpoints import random_draft_config, write_random_draft, write_random_target
from reference_drafter import ReferencePair

from dflare.training.data.target import load_target
from dflare.training.drafter.export import load_drafter
from dflare.training.run.speculate import ContextCache, decode

VARIANTS = {
    "full": {},
    "sliding": {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 5},
    "biased": {"attention_bias": True},
}


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    return write_random_target(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_model_and_reference_draft_the_same(tmp_path, target_folder, variant):
    config = random_draft_config(**VARIANTS[variant])
    folder = write_random_draft(tmp_path / "draft", config=config)
    pair, drafter = ReferencePair(target_folder, folder), load_drafter(folder)
    target = load_target(str(target_folder), config.target_layer_ids)
    torch.manual_seed(0)
    prompt = torch.randint(5, 512, (11,)).tolist()
    (answer,) = decode(target, drafter, [prompt], 20, ())
    text, done = prompt + answer.ids, 1
    states = pair.tapped_states(text)
    for step, block in zip(answer.emitted, answer.blocks, strict=True):
        n0 = len(prompt) + done - 1
        logits = pair.propose(states, text[n0], n0)
        chosen = logits.gather(1, torch.tensor(block)[:, None])[:, 0]
        torch.testing.assert_close(chosen, logits.amax(-1), atol=1e-4, rtol=1e-5)
        done += step


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_agree_within_1e_5(tmp_path, target_folder, variant):
    config = random_draft_config(**VARIANTS[variant])
    folder = write_random_draft(tmp_path / "draft", config=config)
    pair, drafter = ReferencePair(target_folder, folder), load_drafter(folder)
    target = load_target(str(target_folder), config.target_layer_ids)
    torch.manual_seed(0)
    text = torch.randint(5, 512, (1, 12))
    taps = target.read(text).taps
    reference = pair.tapped_states(text[0].tolist())
    torch.testing.assert_close(taps[0], reference.flatten(1), atol=1e-5, rtol=1e-5)

    pair.target.lm_head = torch.nn.Identity()
    cache = ContextCache(drafter, 1, 24, taps)
    with torch.no_grad():
        cache.append(taps, torch.arange(12)[None])
        for length in (1, 6, 11):
            expected = pair.propose(reference, int(text[0, length]), length)
            hidden = cache.draft(target, text[:, length], torch.tensor([length]))
            torch.testing.assert_close(hidden[0], expected, atol=1e-5, rtol=1e-5)
