"""Regret of the width policy on what a drafter really accepts, without the noise of a machine.

    python bench/policy/replay.py DRAFTER [--target demo] [--tokens 96] [--table steps.json]

The target answers the benchmark's prompts; then the drafter proposes a block at every single
position of the answers. Greedy verification commits the same text whatever the widths, so these
lengths say what any sequence of widths would have committed. The policy and every fixed width
serve the same requests against given step times; the policy starts knowing nothing each time.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).parent))

import scenarios

from dflare.adaptive import AdaptiveConfig, CostTable, StepTime, WidthPolicy
from dflare.training.export import load_drafter
from dflare.training.generate import Generator, Sampling
from dflare.training.model import Drafter
from dflare.training.prompts import encode, stop_tokens
from dflare.training.target import Target, load_target, target_path

PROMPTS = Path(__file__).parents[1] / "serving" / "prompts"
_TABLE_ERROR = 0.05  # of a start-up measurement
_STEP_NOISE = 0.05
_SEEDS = 6


def accepted_lengths(
    drafter: Drafter, target: Target, prompt: list[int], answer: list[int]
) -> list[int]:
    """How many drafted tokens the target would accept behind each token of its own answer."""
    size = drafter.config.block_size
    ids = torch.tensor([prompt + answer])
    length = ids.shape[1]
    anchors = torch.arange(len(prompt), length - 1)
    every = torch.arange(length)
    context = drafter.context_kv(target.read(ids).taps, every[None])
    blocks = torch.full((len(anchors), size), drafter.config.mask_token_id)
    blocks[:, 0] = ids[0, anchors]
    slots = anchors[:, None] + torch.arange(size)
    before = (every < anchors[:, None])[:, None, None].expand(-1, 1, size, -1)
    mask = torch.cat([before, before.new_ones(len(anchors), 1, size, size)], -1)
    shared = [
        (k.expand(len(anchors), -1, -1, -1), v.expand(len(anchors), -1, -1, -1)) for k, v in context
    ]
    hidden = drafter.draft(
        target.embed(blocks), slots, shared, dict.fromkeys(drafter.windows, mask)
    )
    drafts = (hidden[:, 1:] @ target.head.T).argmax(-1)
    padded = torch.cat([ids[0], torch.full((size,), -1)])
    return (drafts == padded[slots[:, 1:]]).long().cumprod(-1).sum(-1).tolist()


@torch.no_grad()
def record(drafter_path: str, target_name: str, tokens: int) -> dict[str, list[list[int]]]:
    """Accepted lengths by position, for every prompt of each prompt file."""
    drafter = load_drafter(drafter_path)
    if set(drafter.windows) != {-1}:
        raise SystemExit(
            f"{drafter_path}: has sliding-window layers, which the replay does not mask"
        )
    target = load_target(target_name, drafter.config.target_layer_ids)
    path = target_path(target_name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    stops = stop_tokens(tokenizer, GenerationConfig.from_pretrained(path))
    traces = {}
    for file in sorted(PROMPTS.glob("*.jsonl")):
        turns = [json.loads(line)["conversations"][:1] for line in file.read_text().splitlines()]
        prompts = [encode(tokenizer, turn) for turn in turns]
        generator = Generator(target, 48, 1024, Sampling(max_new_tokens=tokens, stop_ids=stops))
        answers = [(prompts[a.prompt], a.ids) for a in generator.run(prompts)]
        lengths = [accepted_lengths(drafter, target, *pair) for pair in answers]
        traces[file.stem] = [trace for trace in lengths if trace]
    return traces


@dataclass
class _Request:
    rid: int
    trace: list[int]
    at: int = 0


def serve(
    traces: list[list[int]],
    concurrency: int,
    seconds: Callable[[int, int], float],
    width: int | None = None,
    policy: WidthPolicy | None = None,
    seed: int = 0,
) -> float:
    """Tokens per second of one width or of the policy, with so many requests at a time."""
    rng = np.random.default_rng(seed)
    waiting = [_Request(rid, trace) for rid, trace in enumerate(traces)][::-1]
    batch: list[_Request] = []
    elapsed, tokens = 0.0, 0
    while waiting or batch:
        while waiting and len(batch) < concurrency:
            batch.append(waiting.pop())
        left = [len(request.trace) - request.at for request in batch]
        decision = policy.choose([request.rid for request in batch], left) if policy else None
        chosen = decision.width if decision else width
        assert chosen
        took = seconds(len(batch), chosen)
        commits = []
        for request, most in zip(batch, left, strict=True):
            commits.append(min(request.trace[request.at] + 1, chosen, most))
            request.at += commits[-1]
        elapsed, tokens = elapsed + took, tokens + sum(commits)
        if policy and decision:
            policy.observe(decision, commits, took * rng.lognormal(0.0, _STEP_NOISE))
            for request in batch:
                if request.at == len(request.trace):
                    policy.finish(request.rid)
        batch = [request for request in batch if request.at < len(request.trace)]
    return tokens / elapsed


def shuffled(pool: list[list[int]], count: int, seed: int) -> list[list[int]]:
    """So many traces, every one as often as the others."""
    rng, drawn = random.Random(seed), list[list[int]]()
    while len(drawn) < count:
        drawn += rng.sample(pool, len(pool))
    return drawn[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("drafter", help="checkpoint folder")
    parser.add_argument("--target", default="demo")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--shape", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--table", type=Path, help="measured step times instead of a shape")
    parser.add_argument("--max-batch", type=int, default=16)
    args = parser.parse_args()

    traces = record(args.drafter, args.target, args.tokens)
    traces["mix"] = [trace for pool in traces.values() for trace in pool]
    config = AdaptiveConfig.for_block_size(load_drafter(args.drafter).config.block_size)
    seconds = getattr(scenarios, args.shape)
    if args.table:
        seconds = scenarios.loaded(args.table, config.widths)
    ladder = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= args.max_batch]
    worst = float("inf")
    for name, pool in traces.items():
        for concurrency in ladder:
            rates: dict[int | str, list[float]] = {w: [] for w in (*config.widths, "policy")}
            for seed in range(_SEEDS):
                requests = shuffled(pool, 9 * max(concurrency, 4), seed)
                for width in config.widths:
                    rates[width].append(serve(requests, concurrency, seconds, width=width))
                rng = np.random.default_rng([seed, 1])
                table = [
                    StepTime(n, w, seconds(n, w) * rng.lognormal(0.0, _TABLE_ERROR))
                    for n in ladder
                    for w in config.widths
                ]
                policy = WidthPolicy(config, CostTable(config.widths, table))
                rates["policy"].append(
                    serve(requests, concurrency, seconds, policy=policy, seed=seed)
                )
            mean = {arm: float(np.mean(values)) for arm, values in rates.items()}
            best = max(config.widths, key=lambda width: mean[width])
            ratio = mean["policy"] / mean[best]
            worst = min(worst, ratio)
            print(
                f"{name:8} {concurrency:3} at a time: policy / best fixed {ratio:.3f} "
                f"(width {best}, {mean[best] / mean[1]:.2f} x width 1)",
                flush=True,
            )
    print(f"worst policy / best fixed {worst:.3f}")


if __name__ == "__main__":
    main()
