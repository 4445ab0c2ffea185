"""Penalties, sampling and seeds on the CUDA device."""

from collections import Counter

import pytest
import torch
from models import GREEDY, prompts

pytestmark = pytest.mark.slow

IDS = prompts(1, 10, 11, seed=5)[0]


def request_of(name: str, sampling: dict, ids=IDS, **more) -> dict:
    settings = GREEDY | {"max_new_tokens": 30} | sampling
    return {"rid": name, "ids": ids, "sampling": settings} | more


def test_penalties_beside_the_prefill_of_others(alone, dflare):
    requests = [
        request_of("penalised", {"frequency_penalty": 1.5, "max_new_tokens": 40}),
        *(
            request_of(f"long-{i}", {"max_new_tokens": 4}, after=6 + 6 * i, ids=ids)
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
    answers = sampled(dflare, "sampled", count, top_k=kept)
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


def test_seeds_are_honoured(dflare):
    answers = sampled(dflare, "seed", 2, sampling_seed=7, max_new_tokens=12)
    assert answers[0] == answers[1]
