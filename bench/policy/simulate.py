"""Regret of the width policy against an oracle, and against every fixed width.

    python -m bench.policy.simulate [--shape cpu|gpu] [--table steps.json] [--steps 4000]

The oracle knows each request's true acceptance and the true mean step times and takes the best
width of every single step; it has nothing to learn and no noise. Regret is the share of the
oracle's tokens that the policy misses, both counted along the policy's own run:
1 - sum E[tokens | chosen width] / sum (best rate * time of the chosen width). The other column
holds the policy's tokens per second over those of the best single width for the whole run.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from bench.policy import scenarios
from bench.policy.world import Scenario, World
from dflare.adaptive import AdaptiveConfig, ArmPolicy


@dataclass(frozen=True)
class Outcome:
    """What one run gave."""

    regret: float
    rate: float  # tokens per second
    explored: float  # share of the time lost to exploring, as the oracle sees it
    switches: int  # changes of width between steps that did not explore
    ragged: float  # what an oracle with one width per request gains over one for the batch
    widths: dict[int, float]  # share of the steps


def max_concurrency(scenario: Scenario) -> int:
    return max(scenario.concurrency(i / 100) for i in range(100))


def run(scenario: Scenario, seed: int, config: AdaptiveConfig) -> Outcome:
    """Serve a scenario with the policy."""
    widths = np.array(config.widths)
    largest = max_concurrency(scenario)
    table = scenarios.start_up_table(
        scenario.seconds, config.arms, largest, scenario.seed_noise, [seed, 2]
    )
    policy = ArmPolicy(config, table)
    world = World(scenario, seed)
    expected = best = committed = elapsed = lost = ragged = uniform = 0.0
    switches, settled, used = 0, 0, dict.fromkeys(config.widths, 0)
    steps = 0
    while elapsed < scenario.duration:
        steps += 1
        progress = elapsed / scenario.duration
        world.admit(progress)
        bs = len(world.batch)
        decision = policy.choose(
            [request.rid for request in world.batch],
            [request.remaining for request in world.batch],
        )
        survival = world.survival(progress)
        times = np.array([scenario.step_seconds(bs, int(w), progress) for w in widths])
        tokens = np.cumsum(survival.sum(axis=0))[widths - 1]
        column = config.widths.index(decision.arm.nodes)
        top = float((tokens / times).max())
        expected += tokens[column]
        best += top * times[column]
        if decision.exploring:
            lost += times[column] - tokens[column] / top
        else:
            switches += bool(settled) and decision.arm.nodes != settled
            settled = decision.arm.nodes
        elapsed += times[column]
        used[decision.arm.nodes] += 1
        uniform += top
        ragged += best_ragged(survival, bs, widths, times)
        commit, seconds = world.step(decision.arm.nodes, survival, progress)
        committed += sum(commit)
        policy.observe(decision, commit, seconds)
        for rid in world.finished:
            policy.finish(rid)
    return Outcome(
        regret=1 - expected / best,
        rate=committed / elapsed,
        explored=lost / elapsed,
        switches=switches,
        ragged=ragged / uniform - 1,
        widths={w: count / steps for w, count in used.items()},
    )


def best_ragged(survival: np.ndarray, bs: int, widths: np.ndarray, times: np.ndarray) -> float:
    """Best rate with a width per request, when only the number of verified tokens costs."""
    extra = np.sort(survival[:, 1:], axis=None)[::-1]
    tokens = bs + np.concatenate(([0.0], np.cumsum(extra)))
    seconds = np.interp(bs + np.arange(len(tokens)), bs * widths, times)
    # One draft pass serves whoever drafts; without drafted tokens there is none.
    seconds[0] = times[0]
    return float((tokens / seconds).max())


def run_fixed(scenario: Scenario, seed: int, width: int) -> float:
    """Tokens per second of one width for the whole run."""
    world = World(scenario, seed)
    committed = elapsed = 0.0
    while elapsed < scenario.duration:
        progress = elapsed / scenario.duration
        world.admit(progress)
        elapsed += scenario.step_seconds(len(world.batch), width, progress)
        commit, _ = world.step(width, world.survival(progress), progress)
        committed += sum(commit)
    return committed / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    scenarios.add_arguments(parser)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()

    config = AdaptiveConfig.for_block_size(args.block_size, proposers=["chain"])
    seconds = scenarios.chosen(args, config.widths)
    print(f"step times: {args.table or args.shape + ' shape'}, widths {config.widths}")
    print(f"{'scenario':32} regret  policy / best fixed  explored  switches  ragged gain  widths")
    regrets, ratios = [], []
    for scenario in scenarios.build(seconds, args.block_size, args.max_batch, args.steps):
        outcomes = [run(scenario, seed, config) for seed in range(args.seeds)]
        fixed = {
            w: np.mean([run_fixed(scenario, seed, w) for seed in range(args.seeds)])
            for w in config.widths
        }
        width = max(fixed, key=fixed.__getitem__)
        mean = {
            name: float(np.mean([getattr(o, name) for o in outcomes]))
            for name in ("regret", "rate", "explored", "switches", "ragged")
        }
        regrets.append(mean["regret"])
        ratios.append(mean["rate"] / fixed[width])
        print(
            f"{scenario.name:32} {mean['regret']:6.1%}  {ratios[-1]:7.3f} (width {width:2})"
            f"   {mean['explored']:8.2%}  {mean['switches']:8.0f}  {mean['ragged']:11.1%}  "
            + " ".join(f"{share:.2f}" for share in outcomes[0].widths.values()),
            flush=True,
        )
    print(f"worst regret {max(regrets):.1%}; worst policy / best fixed {min(ratios):.3f}")


if __name__ == "__main__":
    main()
