"""Tiny pairs in bfloat16 with heads of 64, which the kernels of the CUDA path take."""

import random
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_random_draft, write_random_target
from reference_drafter import ReferencePair

LAYERS = 3
_SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "bfloat16"}
# The reference computes in float32, the engine in bfloat16: logits closer than this are a tie.
TIE = 0.2
CAPTURED = 4  # requests of the largest graph, unless a test says otherwise
GREEDY = {"temperature": 0, "ignore_eos": True}
# Without it a random model answers with white space alone.
GRAMMAR = {"grammar_backend": "xgrammar", "constrained_json_disable_any_whitespace": True}


def write_pair(folder: Path, **draft: Any) -> tuple[Path, Path]:
    """A random target of three layers and a random drafter; `draft` are its other settings."""
    target = write_random_target(folder / "target", num_layers=LAYERS, **_SIZES)
    settings = _SIZES | {"num_target_layers": LAYERS} | draft
    return target, write_random_draft(folder / "draft", **settings)


def prompts(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [draw.randrange(5, 500) for _ in range(draw.randrange(low, high))] for _ in range(count)
    ]


def greedy(name: str, ids: list[list[int]], new_tokens: int, **more: Any) -> list[dict[str, Any]]:
    """Greedy requests NAME-0, NAME-1, ..."""
    return [
        {"rid": f"{name}-{i}", "ids": x, "sampling": GREEDY | {"max_new_tokens": new_tokens}} | more
        for i, x in enumerate(ids)
    ]


def repeating(name: str, count: int, new_tokens: int = 24) -> list[dict[str, Any]]:
    """Texts that repeat themselves; some come later, beside steps of the others."""
    ids = [x + x[: len(x) // 2] for x in prompts(count, 20, 90, seed=50)]
    return [
        request | {"after": 4 * max(0, i - 2)}
        for i, request in enumerate(greedy(name, ids, new_tokens))
    ]


def expected_replays(result: dict[str, Any]) -> int:
    """Graphs of a run: the target's, and the drafter's, of each step that fits a captured size."""
    steps = zip(result["widths"], result["batches"], strict=True)
    return sum(1 + (width > 1) for width, requests in steps if requests <= CAPTURED)


@torch.no_grad()
def assert_greedy(pair: ReferencePair, prompt: list[int], output: list[int]) -> None:
    """Every token is what transformers' float32 model of the target ranks first, up to a tie."""
    logits = pair.target(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    gaps = logits.max(-1).values - logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    worst = int(gaps.argmax())
    assert gaps[worst] <= TIE, (
        f"token {worst} is {output[worst]}, the target's own {int(logits[worst].argmax())} "
        f"(logits {gaps[worst]:.3f} apart)"
    )


def check_answers(
    result: dict[str, Any], requests: list[dict[str, Any]], reference: ReferencePair
) -> None:
    """Every answer is whole, and the target's."""
    for request in requests:
        ids = result["answers"][request["rid"]]["ids"]
        assert len(ids) == request["sampling"]["max_new_tokens"]
        assert_greedy(reference, request["ids"], ids)


def check_waits_and_races(
    scheduler: Any, requests: list[dict[str, Any]], reference: ReferencePair
) -> None:
    """Decode steps give the target's tokens, add no host wait to SGLang's own, and race nowhere."""
    scheduler.generate(requests)
    scheduler.call("flush_cache")
    result = scheduler.generate(requests, count_waits=True)
    check_answers(result, requests, reference)
    waits = [site for site in result["waits"] if any("forward_batch_generation" in c for c in site)]
    assert not waits, waits[:3]
    scheduler.call("flush_cache")
    races = scheduler.generate(requests, watch_races=True)["races"]
    assert not races, "\n".join(races[:5])
