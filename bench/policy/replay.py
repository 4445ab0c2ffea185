"""Regret of the width policy on what a drafter really accepts, without the noise of a machine.

    python -m bench.policy.replay DRAFTER [--target demo] [--tokens 96] [--table steps.json]

The target answers the benchmark's prompts; then the drafter proposes a block at every single
position of the answers. Greedy verification commits the same text whatever the widths, so these
lengths say what any sequence of widths would have committed. The policy and every fixed width
serve the same requests against given step times; the policy starts knowing nothing each time.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from bench.policy import scenarios
from bench.policy.simulate import best_ragged
from dflare.adaptive import AdaptiveConfig, ArmPolicy, chain
from dflare.training.data.generate import Generator, Sampling
from dflare.training.data.prompts import encode, read_prompts, stop_tokens
from dflare.training.data.target import Target, load_target, target_path
from dflare.training.drafter.export import load_drafter
from dflare.training.drafter.model import Drafter
from dflare.training.run.step import draft_blocks

PROMPTS = Path(__file__).parents[1] / "serving" / "prompts"
_TABLE_ERROR = 0.05  # of a start-up measurement
_STEP_NOISE = 0.05
_SEEDS = 6
_BATCHES = 400


def accepted_lengths(
    drafter: Drafter, target: Target, prompt: list[int], answer: list[int]
) -> list[int]:
    """How many drafted tokens the target would accept behind each token of its own answer."""
    size = drafter.config.block_size
    ids = torch.tensor([prompt + answer])
    anchors = torch.arange(len(prompt), ids.shape[1] - 1)[None]
    taps = target.read(ids).taps
    hidden = draft_blocks(drafter, drafter.config, target, ids, anchors, taps)[0]
    drafts = (hidden[:, 1:] @ target.head.T).argmax(-1)
    padded = torch.cat([ids[0], torch.full((size,), -1)])
    expected = padded[anchors[0, :, None] + torch.arange(1, size)]
    return (drafts == expected).long().cumprod(-1).sum(-1).tolist()


@torch.no_grad()
def record(drafter: Drafter, target_name: str, tokens: int) -> dict[str, list[list[int]]]:
    """Accepted lengths by position, for every prompt of each prompt file."""
    path = target_path(target_name)
    target = load_target(path, drafter.config.target_layer_ids)
    tokenizer = AutoTokenizer.from_pretrained(path)
    stops = stop_tokens(tokenizer, target.model.generation_config)
    traces = {}
    for file in sorted(PROMPTS.glob("*.jsonl")):
        prompts = [encode(tokenizer, messages) for messages in read_prompts(file)]
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
    seconds: scenarios.Seconds,
    width: int | None = None,
    policy: ArmPolicy | None = None,
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
        chosen = decision.arm.nodes if decision else width
        assert chosen
        took = seconds(len(batch), chain(chosen))
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


def ragged_gain(
    traces: list[list[int]], concurrency: int, widths: tuple[int, ...], seconds: scenarios.Seconds
) -> float:
    """What a width per request would add to the best uniform one, both knowing each acceptance."""
    columns = np.array(widths)
    times = np.array([seconds(concurrency, chain(width)) for width in widths])
    reach = np.array([[np.mean(np.array(t) >= k) for k in range(widths[-1])] for t in traces])
    rng = np.random.default_rng(0)
    uniform = ragged = 0.0
    for _ in range(_BATCHES):
        survival = reach[rng.choice(len(traces), concurrency, replace=concurrency > len(traces))]
        tokens = np.cumsum(survival.sum(axis=0))[columns - 1]
        uniform += float((tokens / times).max())
        ragged += best_ragged(survival, concurrency, columns, times)
    return ragged / uniform - 1


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
    scenarios.add_arguments(parser)
    parser.add_argument("--max-batch", type=int, default=16)
    args = parser.parse_args()

    drafter = load_drafter(args.drafter)
    traces = record(drafter, args.target, args.tokens)
    traces["mix"] = [trace for pool in traces.values() for trace in pool]
    config = AdaptiveConfig.for_block_size(drafter.config.block_size, proposers=["chain"])
    seconds = scenarios.chosen(args, config.arms)
    ladder = scenarios.batch_sizes(args.max_batch)
    worst = float("inf")
    for name, pool in traces.items():
        for concurrency in ladder:
            rates: dict[int | str, list[float]] = {w: [] for w in (*config.widths, "policy")}
            for seed in range(_SEEDS):
                requests = shuffled(pool, 9 * max(concurrency, 4), seed)
                for width in config.widths:
                    rates[width].append(serve(requests, concurrency, seconds, width=width))
                table = scenarios.start_up_table(
                    seconds, config.arms, args.max_batch, _TABLE_ERROR, [seed, 1]
                )
                policy = ArmPolicy(config, table)
                rates["policy"].append(
                    serve(requests, concurrency, seconds, policy=policy, seed=seed)
                )
            mean = {arm: float(np.mean(values)) for arm, values in rates.items()}
            best = max(config.widths, key=lambda width: mean[width])
            ratio = mean["policy"] / mean[best]
            worst = min(worst, ratio)
            print(
                f"{name:8} {concurrency:3} at a time: policy / best fixed {ratio:.3f} "
                f"(width {best}, {mean[best] / mean[1]:.2f} x width 1), a width per request "
                f"+{ragged_gain(pool, concurrency, config.widths, seconds):.1%}",
                flush=True,
            )
    print(f"worst policy / best fixed {worst:.3f}")


if __name__ == "__main__":
    main()
