"""With temperature, the distribution of the next tokens is the target's own."""

from collections import Counter

import pytest
import torch
from checkpoints import random_draft_config, random_tensors
from engines import proposals, running_engine
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from dflare.checkpoint import save_checkpoint
from dflare.engine.sampling import argmax

pytestmark = pytest.mark.slow

TEMPERATURE, TOP_K, TOP_P = 0.8, 5, 0.97
SAMPLING = {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P, "ignore_eos": True}
SAMPLES, LENGTH = 2000, 3
# Probability that a correct engine fails this test; a wrong one fails with far smaller p-values.
FALSE_ALARM_RATE = 1e-4


@pytest.fixture(scope="module")
def constant_pair(random_pair, tmp_path_factory):
    """A drafter whose layers add nothing to the mask's embedding: it always says the same."""
    target, _ = random_pair
    config = random_draft_config()
    weights = random_tensors(config, seed=0)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name].zero_()
    weights["norm.weight"].fill_(1)
    draft = tmp_path_factory.mktemp("constant") / "draft"
    save_checkpoint(draft, config, weights)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    embedding = model.get_input_embeddings().weight[config.mask_token_id]
    normed = embedding * torch.rsqrt(embedding.square().mean() + config.rms_norm_eps)
    return target, draft, model, int((model.lm_head.weight @ normed).argmax())


@torch.no_grad()
def next_token_probs(model, tokens: list[int]) -> dict[int, float]:
    """The target's distribution after temperature, top-k and top-p, as SGLang filters."""
    logits = model(torch.tensor([tokens])).logits[0, -1].double()
    probs, ids = torch.softmax(logits / TEMPERATURE, -1).sort(descending=True)
    keep = (torch.arange(len(ids)) < TOP_K) & (probs.cumsum(0) - probs <= TOP_P)
    kept = probs[keep] / probs[keep].sum()
    return dict(zip(ids[keep].tolist(), kept.tolist(), strict=True))


def find_prompt(model, constant: int) -> list[int]:
    """A prompt after which the drafter's token is sampled now and then, so that both happen."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(2000):
        prompt = torch.randint(5, 500, (6,), generator=draw).tolist()
        first = next_token_probs(model, prompt)
        hit = sum(
            p * next_token_probs(model, [*prompt, token]).get(constant, 0.0)
            for token, p in first.items()
        )
        if 0.1 < hit < 0.9:
            return prompt
    raise AssertionError("no prompt of 2000 makes the drafter's token likely")


def find_repeating_prompt(model) -> list[int]:
    """A prompt whose look-up is often possible behind the first token, and often right then."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(500):
        x, y, z, first, second = torch.randint(5, 500, (5,), generator=draw).tolist()
        for _ in range(4):
            prompt = [x, y, first, second, z, x, y]
            likely = next_token_probs(model, prompt)
            first = max(likely, key=likely.__getitem__)
            then = next_token_probs(model, [*prompt, first])
            second = max(then, key=then.__getitem__)
            if prompt[2:4] == [first, second] and likely[first] > 0.3 and then[second] < 0.8:
                return prompt
    raise AssertionError("no prompt of 500 repeats itself with the likeliest tokens")


def three_tokens(model, prompt: list[int]) -> Counter[tuple[int, ...]]:
    """How often each three tokens are expected behind a prompt in `SAMPLES` answers."""
    expected: Counter[tuple[int, ...]] = Counter()
    for first, p in next_token_probs(model, prompt).items():
        for second, q in next_token_probs(model, [*prompt, first]).items():
            for third, r in next_token_probs(model, [*prompt, first, second]).items():
                expected[first, second, third] = p * q * r * SAMPLES
    return expected


def assert_distribution(answers, expected: Counter[tuple[int, ...]]) -> None:
    observed = Counter(tuple(answer["output_ids"]) for answer in answers)
    assert set(observed) <= set(expected), "a token that top-k or top-p excludes was sampled"
    rare = [cell for cell in expected if expected[cell] < 5]
    common = [cell for cell in expected if expected[cell] >= 5]
    f_expected = [expected[cell] for cell in common] + [sum(expected[cell] for cell in rare)]
    f_observed = [observed[cell] for cell in common] + [sum(observed[cell] for cell in rare)]
    p_value = chisquare(f_observed, f_expected).pvalue
    assert p_value > FALSE_ALARM_RATE, f"{f_observed} against {f_expected}"


def test_distribution_of_three_tokens_with_look_ups(constant_pair):
    target, draft, model, constant = constant_pair
    prompt = find_repeating_prompt(model)
    sampling = SAMPLING | {"max_new_tokens": LENGTH}
    rids = [f"look-up-{i}" for i in range(SAMPLES)]
    turns = (("lookup", 4), ("spliced", 3), 1, ("spliced", 4), ("lookup", 2))
    with running_engine(target, draft, widths=turns, random_seed=7) as engine:
        answers = engine.generate(input_ids=[prompt] * SAMPLES, sampling_params=sampling, rid=rids)
    assert_distribution(answers, three_tokens(model, prompt))
    blocks = [step["block"] for i in range(0, SAMPLES, 50) for step in proposals(f"look-up-{i}")]
    proposed = Counter(block[1] for block in blocks if len(block) > 1)
    assert proposed[prompt[3]] > 10 and proposed[constant] > 0, "both must propose"
    accepted = sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
    assert SAMPLES * 0.05 < accepted < SAMPLES * 1.9, "both accepting and rejecting must happen"


@pytest.fixture(scope="module")
def drafts_alone(constant_pair):
    """Three tokens of many samples; greedy requests, alone and beside sampled ones."""
    target, draft, model, constant = constant_pair
    sampling = SAMPLING | {"max_new_tokens": LENGTH}
    greedy = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True}
    hot = greedy | {"temperature": 1.5}
    prompt, prompts = find_prompt(model, constant), [[9, 10, 11], [12, 13, 14]]
    rids = [f"sample-{i}" for i in range(SAMPLES)]
    with running_engine(target, draft, widths=(4, 2, 1, 3), random_seed=7) as engine:
        return (
            engine.generate(input_ids=[prompt] * SAMPLES, sampling_params=sampling, rid=rids),
            engine.generate(input_ids=prompts, sampling_params=greedy),
            engine.generate(input_ids=prompts * 2, sampling_params=[greedy, greedy, hot, hot]),
        )


def test_distribution_of_three_tokens(constant_pair, drafts_alone):
    _, _, model, constant = constant_pair
    answers, *_ = drafts_alone
    assert_distribution(answers, three_tokens(model, find_prompt(model, constant)))
    blocks = [step["block"] for i in range(0, SAMPLES, 50) for step in proposals(f"sample-{i}")]
    assert {len(block) for block in blocks} == {1, 2, 3, 4}, "all widths must happen"
    assert {token for block in blocks for token in block[1:]} == {constant}
    accepted = sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
    assert SAMPLES * 0.05 < accepted < SAMPLES * 1.9, "both accepting and rejecting must happen"


def test_greedy_and_sampled_requests_in_one_batch(drafts_alone):
    """Rows that ask for greedy stay greedy beside sampled ones."""
    _, alone, mixed = ([answer["output_ids"] for answer in answers] for answers in drafts_alone)
    assert mixed[:2] == alone
    assert mixed[2:] != alone


@pytest.mark.parametrize("vocab_size", [128, 1280, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_is_torchs(vocab_size, dtype):
    logits = torch.randint(-9, 9, (64, vocab_size)).to(dtype)  # full of ties
    logits[1:9, 7] = logits[5:13, -1] = torch.nan
    logits[13:20, : vocab_size // 2] = logits[20] = -torch.inf
    assert argmax(logits).equal(logits.argmax(-1))
    assert argmax(logits[:, :640]).equal(logits[:, :640].argmax(-1))
