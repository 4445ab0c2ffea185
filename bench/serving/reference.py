"""Answers of a server without speculation, to hold those of one with it against."""

import random
from dataclasses import dataclass

import requests

GREEDY_TOKENS = 64
LONG_TOKENS = 16
PATTERN = r"[0-9]{3}-[0-9]{4}"
PATTERN_PARAMS = {"temperature": 0, "max_new_tokens": 32, "regex": PATTERN}
_LONG_PROMPTS = 12


@dataclass(frozen=True)
class Reference:
    """Greedy answers, token ids by prompt.

    Attributes:
        greedy: `GREEDY_TOKENS` each, whatever ends an answer.
        long: `LONG_TOKENS` each; the prompts begin alike.
        pattern: Answers to the prompts of `greedy` that must match `PATTERN`.
    """

    greedy: dict[str, list[int]]
    long: dict[str, list[int]]
    pattern: dict[str, list[int]]


def greedy_params(tokens: int) -> dict[str, object]:
    """Sampling parameters of a greedy answer of exactly so many tokens."""
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}


def long_prompts(prompts: list[str], seed: int) -> list[str]:
    """Prompts of up to 250 words and another prompt, so that prefixes hit and are evicted."""
    rng = random.Random(seed)
    words = " ".join(prompts).split()
    return [
        " ".join([*words[: rng.randint(50, 250)], rng.choice(prompts)])
        for _ in range(_LONG_PROMPTS)
    ]


def ask(url: str, text: str, params: dict[str, object]) -> list[int]:
    """Token ids of one answer.

    Raises:
        requests.RequestException: The server does not answer, or refuses.
    """
    body = {"text": text, "sampling_params": params}
    reply = requests.post(f"{url}/generate", json=body, timeout=600)
    reply.raise_for_status()
    return reply.json()["output_ids"]


def collect(url: str, prompts: list[str], seed: int) -> Reference:
    """Ask a server for everything, one request at a time.

    Args:
        url: Of a server without speculation.
        prompts: Short ones.
        seed: Of the long ones.
    """
    long = long_prompts(prompts, seed)
    return Reference(
        {text: ask(url, text, greedy_params(GREEDY_TOKENS)) for text in prompts},
        {text: ask(url, text, greedy_params(LONG_TOKENS)) for text in long},
        {text: ask(url, text, PATTERN_PARAMS) for text in prompts},
    )
