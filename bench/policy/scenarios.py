"""Workloads and step-time shapes for the policy simulator."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.policy.world import DRAFTED, Scenario
from dflare.adaptive import PLAIN, Arm, CostTable, StepTime

Seconds = Callable[[int, Arm], float]


def cpu(batch: int, arm: Arm) -> float:
    """The demo pair on 2 cores of an AMD EPYC: weights come from memory, then every token costs.

    A tree's block is taken for as wide as the tree.
    """
    tokens = batch * arm.nodes
    draft = 4e-3 + 0.3e-3 * tokens if arm.proposer in DRAFTED else 0.0
    return 28.5e-3 + 0.95e-3 * tokens + draft


def gpu(batch: int, arm: Arm) -> float:
    """An 8B model on one GPU: weight-bound up to some 250 tokens a step, compute-bound after."""
    tokens = batch * arm.nodes
    draft = 0.9e-3 + 1e-6 * tokens if arm.proposer in DRAFTED else 0.0
    return 5.6e-3 + 8e-6 * batch + 21e-6 * max(tokens - 200, 0) + 2e-6 * tokens + draft


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choice of step times, `--shape` or `--table`."""
    parser.add_argument("--shape", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--table", type=Path, help="measured step times instead of a shape")


def chosen(args: argparse.Namespace, arms: tuple[Arm, ...]) -> Seconds:
    """Step times that the command line asks for."""
    if args.table:
        return measured(args.table, arms)
    return {"cpu": cpu, "gpu": gpu}[args.shape]


def measured(path: Path, arms: tuple[Arm, ...]) -> Seconds:
    """What a server measured at start-up: `step-times-<pid>.json` of `DFLARE_STEP_TRACE`."""
    table = CostTable.load(path, arms)
    columns_of = {
        arm.proposer: [
            i for i, other in enumerate(arms) if other.proposer in ("plain", arm.proposer)
        ]
        for arm in arms
    }

    def seconds(batch: int, arm: Arm) -> float:
        columns = columns_of[arm.proposer]
        sizes = [arms[i].nodes for i in columns]
        return float(np.interp(arm.nodes, sizes, table.seconds(batch)[columns]))

    return seconds


def batch_sizes(largest: int) -> list[int]:
    """The batch sizes that are measured at start-up, up to a largest."""
    return [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= largest]


def start_up_table(
    seconds: Seconds,
    arms: tuple[Arm, ...],
    largest: int,
    error: float,
    seed: Sequence[int],
) -> CostTable:
    """What start-up measures, with its relative error."""
    rng = np.random.default_rng(seed)
    return CostTable(
        arms,
        [
            StepTime(n, arm, seconds(n, arm) * rng.lognormal(0.0, error))
            for n in batch_sizes(largest)
            for arm in arms
        ],
    )


def constant(value: float) -> Callable[[float], float]:
    return lambda progress: value


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _jumps(*levels: float) -> Callable[[float], float]:
    return lambda progress: levels[min(int(progress * len(levels)), len(levels) - 1)]


def build(seconds: Seconds, block_size: int, max_batch: int, steps: int) -> list[Scenario]:
    """The workloads, each under one step-time shape.

    Args:
        seconds: True mean step time of (batch, arm).
        block_size: Tokens of a draft block.
        max_batch: Most requests at a time.
        steps: Length of a run, in plain decode steps.
    """
    base = Scenario(
        name="",
        block_size=block_size,
        duration=steps * seconds(1, PLAIN),
        seconds=seconds,
        concurrency=lambda progress: 1,
        level=constant(logit(0.6)),
    )
    easy, middle, hard, hopeless = (logit(p) for p in (0.93, 0.7, 0.37, 0.08))
    ladder = batch_sizes(max_batch)
    high = ladder[-1]

    def fixed(name: str, level: float, batch: int, **changes: object) -> Scenario:
        return replace(
            base,
            name=f"{name}, {batch} at a time",
            level=constant(level),
            concurrency=lambda progress: batch,
            duration=steps * seconds(batch, PLAIN),
            **changes,
        )

    mix = ((0.5, 1.5), (0.5, -1.5))
    copies, quotes = (0.2, 60.0), (0.01, 15.0)  # nearly all of a text, some passages of it
    scenarios = [
        fixed(name, level, batch)
        for name, level in (("easy", easy), ("middle", middle), ("hard", hard), ("none", hopeless))
        for batch in (1, ladder[len(ladder) // 2], high)
    ]
    scenarios += [fixed("mix", logit(0.6), batch, tilts=mix) for batch in (1, 4, high)]
    scenarios += [
        fixed(f"{name}, {kind}", level, batch, copying=copying)
        for kind, copying in (("copies", copies), ("quotes", quotes))
        for name, level in (("middle", middle), ("hard", hard))
        for batch in (1, ladder[len(ladder) // 2], high)
    ]
    shifts = _jumps(easy, hopeless, easy, hard, easy, hopeless)

    def wave(progress: float) -> int:
        return round(1 + (high - 1) * math.sin(math.pi * 3 * progress) ** 2)

    long = steps * seconds(high // 2, PLAIN)
    other_work = (0.004, 40, 1.5)  # a seventh of the time
    scenarios += [
        replace(
            base,
            name="load comes and goes",
            level=constant(middle),
            concurrency=wave,
            duration=long,
        ),
        replace(base, name="acceptance jumps, 1 at a time", level=shifts),
        replace(
            base,
            name=f"acceptance jumps, {ladder[-2]} at a time",
            level=shifts,
            concurrency=lambda progress: ladder[-2],
            duration=steps * seconds(ladder[-2], PLAIN),
        ),
        replace(base, name="machine slows to half", slowdown=_jumps(1.0, 2.0, 1.0), tilts=mix),
        replace(
            base,
            name=f"contexts grow, {high} at a time",
            level=constant(middle),
            concurrency=lambda progress: high,
            duration=4 * steps * seconds(high, PLAIN),
            context=lambda progress: 5 * progress,
        ),
        replace(base, name="seed measured badly", seed_noise=0.4, level=constant(middle)),
        replace(
            base, name="other work at times, 1 at a time", busy=other_work, level=constant(hard)
        ),
        fixed("other work at times", hard, ladder[len(ladder) // 2 + 1], busy=other_work),
        replace(base, name="first drafts take long", slow_start=20, level=constant(hard)),
        replace(
            base,
            name="everything shifts",
            concurrency=wave,
            duration=long,
            tilts=mix,
            level=lambda progress: hard + 2.0 * math.sin(math.pi * 5 * progress),
            slowdown=_jumps(1.0, 1.5, 1.0),
        ),
    ]
    return scenarios
