"""Sampling parameters on the CUDA device: greedy answers are those of the target alone.

The comparison is with SGLang without speculation and without overlap: with overlap its own
penalties act a token late.
"""

import json
from collections import Counter

import pytest
import torch
from models import GREEDY, assert_greedy, prompts

pytestmark = pytest.mark.slow

IDS = prompts(1, 10, 11, seed=5)[0]
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"age": {"enum": [7, 42]}, "city": {"enum": ["Paris", "Rome"]}},
        "required": ["age", "city"],
    }
)
CASES = {
    "regex": {"regex": "(red|blue), (green|grey)[a-z]{3,9}\\.", "ignore_eos": False},
    "json": {"json_schema": SCHEMA, "ignore_eos": False, "max_new_tokens": 40},
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": 1.9},
    "repetition": {"repetition_penalty": 1.6},
    "min_new_tokens": {
        "min_new_tokens": 20,
        "stop_token_ids": list(range(5, 260)),
        "ignore_eos": False,
    },
    "bias": {"logit_bias": {"33": 6.0}},
    "stop_token": {"stop_token_ids": list(range(100, 260)), "ignore_eos": False},
    "stop_string": {"stop": ["e", "th"], "max_new_tokens": 60},
}


def requests_of(name: str, sampling: dict, **more) -> dict:
    return {
        "rid": name,
        "ids": IDS,
        "sampling": GREEDY | {"max_new_tokens": 30} | sampling,
    } | more


@pytest.fixture(scope="module")
def both(alone, dflare):
    """All cases beside each other on both schedulers, with a plain request and logprobs."""
    requests = [requests_of(name, sampling) for name, sampling in CASES.items()]
    requests += [
        requests_of("plain", {}),
        requests_of("logprobs", {}, logprobs=3),
        # As SGLang's front end makes n answers: the prompt once, then copies of the request.
        *(requests_of(f"n-{i}", {}, after=8) for i in range(3)),
    ]
    return [scheduler.generate(requests)["answers"] for scheduler in (alone, dflare)]


@pytest.mark.parametrize("name", list(CASES))
def test_same_tokens_and_finish_reason(both, name):
    alone, dflare = (answers[name] for answers in both)
    assert dflare["ids"] == alone["ids"]
    assert dflare["finish"] == alone["finish"]


@pytest.mark.parametrize("name", ["regex", "json", "frequency", "presence", "repetition", "bias"])
def test_the_parameter_matters(both, name):
    assert both[1][name]["ids"] != both[1]["plain"]["ids"]


def test_finish_reasons(both):
    answers = both[1]
    assert answers["json"]["finish"]["type"] == answers["regex"]["finish"]["type"] == "stop"
    assert answers["stop_string"]["finish"]["matched"] in ("e", "th")
    assert answers["stop_token"]["finish"]["matched"] in range(100, 260)
    assert len(answers["min_new_tokens"]["ids"]) > 20


def test_logprobs(both):
    alone, dflare = (answers["logprobs"] for answers in both)
    assert dflare["logprob_ids"] == alone["logprob_ids"]
    # bfloat16: rows of another batch are rounded elsewhere.
    torch.testing.assert_close(
        torch.tensor(dflare["logprobs"]), torch.tensor(alone["logprobs"]), atol=0.1, rtol=0
    )
    assert len(dflare["top_logprobs"]) == len(dflare["ids"])


def test_n_answers_are_equal(both):
    answers = both[1]
    assert [answers[f"n-{i}"]["ids"] for i in range(3)] == [answers["plain"]["ids"]] * 3
    assert answers["n-2"]["cached"] >= len(IDS) - 1


def test_penalties_beside_the_prefill_of_others(alone, dflare):
    requests = [
        requests_of("penalised", {"frequency_penalty": 1.5, "max_new_tokens": 40}),
        *(
            requests_of(f"long-{i}", {"max_new_tokens": 4}, after=6 + 6 * i, ids=ids)
            for i, ids in enumerate(prompts(4, 150, 200, seed=6))
        ),
    ]
    first, second = (s.generate(requests)["answers"]["penalised"] for s in (alone, dflare))
    assert second["ids"] == first["ids"]


def sampled(scheduler, name: str, count: int, **sampling) -> list[list[int]]:
    settings = {"temperature": 1.0, "max_new_tokens": 4} | sampling
    requests = [
        {"rid": f"{name}-{i}", "ids": IDS, "sampling": GREEDY | settings} for i in range(count)
    ]
    answers = scheduler.generate(requests)["answers"]
    return [answers[r["rid"]]["ids"] for r in requests]


def test_samples_follow_the_targets_distribution(dflare, reference):
    """The first token is sampled by a prefill, the second by a verification."""
    count, kept = 160, 4
    answers = sampled(dflare, "sampled", count, top_k=kept, max_new_tokens=2)
    with torch.no_grad():
        logits = reference.target(torch.tensor([IDS])).logits[0, -1]
        top = logits.topk(kept)
        expected = dict(zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True))
        assert_frequencies([a[0] for a in answers], expected)
        first = Counter(a[0] for a in answers).most_common(1)[0][0]
        top = reference.target(torch.tensor([[*IDS, first]])).logits[0, -1].topk(kept)
        expected = dict(zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True))
        assert_frequencies([a[1] for a in answers if a[0] == first], expected)


def assert_frequencies(tokens: list[int], expected: dict[int, float]) -> None:
    """Each token's count lies within four standard deviations."""
    assert set(tokens) <= set(expected), "a token beyond the top k"
    count = Counter(tokens)
    for token, p in expected.items():
        deviation = (len(tokens) * p * (1 - p)) ** 0.5
        assert abs(count[token] - len(tokens) * p) <= 4 * deviation + 1, (token, p, count)


def test_top_k_one_is_greedy(dflare, both):
    answer = sampled(dflare, "top", 1, top_k=1, max_new_tokens=30)[0]
    assert answer == both[1]["plain"]["ids"]


def test_min_p_is_honoured(dflare, reference):
    """Only tokens as likely as the likeliest pass: greedy, but for ties in bfloat16."""
    answer = sampled(dflare, "min-p", 1, min_p=1.0, temperature=3.0, max_new_tokens=30)[0]
    assert_greedy(reference, IDS, answer)


def test_seeds_are_honoured(dflare):
    answers = sampled(dflare, "seed", 2, sampling_seed=7, max_new_tokens=12)
    assert answers[0] == answers[1]
