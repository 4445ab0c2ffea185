"""Regret of the policy against an oracle, and against every fixed arm.

    python -m bench.policy.simulate [--shape cpu|gpu] [--table steps.json] [--steps 4000]
                                    [--proposers chain]

The oracle knows each request's true acceptance, where its text repeats, and the true mean step
times; it takes the best arm of every single step, and the better of both proposals for every
request; it has nothing to learn and no noise. Regret is the share of the oracle's tokens that the
policy misses, both counted along the policy's own run:
1 - sum E[tokens | chosen arm] / sum (best rate * time of the chosen arm). The other column
holds the policy's tokens per second over those of the best single arm for the whole run.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.policy import scenarios
from bench.policy.world import Scenario, World
from dflare.adaptive import NEVER, PLAIN, AdaptiveConfig, Arm, ArmPolicy, chain

_FIXED_SPLICE = 4  # least match of the fixed arms that replace drafts: longer than one by chance


@dataclass(frozen=True)
class Outcome:
    """What one run gave."""

    regret: float
    rate: float  # tokens per second
    explored: float  # share of the time lost to exploring, as the oracle sees it
    switches: int  # changes of arm between steps that did not explore
    ragged: float  # what an oracle with one width per request gains over one for the batch
    arms: dict[Arm, float]  # share of the steps


def max_concurrency(scenario: Scenario) -> int:
    return max(scenario.concurrency(i / 100) for i in range(100))


def run(scenario: Scenario, seed: int, config: AdaptiveConfig) -> Outcome:
    """Serve a scenario with the policy."""
    arms, widths = config.arms, np.array(config.widths)
    largest = max_concurrency(scenario)
    table = scenarios.start_up_table(
        scenario.seconds, config.arms, largest, scenario.seed_noise, [seed, 2]
    )
    policy = ArmPolicy(config, table)
    world = World(scenario, seed)
    expected = best = committed = elapsed = lost = ragged = uniform = 0.0
    switches, settled, used = 0, PLAIN, dict.fromkeys(arms, 0)
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
        times = np.array([scenario.step_seconds(bs, arm, progress) for arm in arms])
        best_splice = None if "lookup" in config.proposers else NEVER
        tokens = expected_tokens(world, survival, progress, arms, best_splice)
        column = arms.index(decision.arm)
        top = float((tokens / times).max())
        expected += expected_tokens(world, survival, progress, arms, decision.rule.splice)[column]
        best += top * times[column]
        if decision.exploring:
            lost += times[column] - tokens[column] / top
        else:
            switches += bool(used[settled]) and decision.arm != settled
            settled = decision.arm
        elapsed += times[column]
        used[decision.arm] += 1
        chains = [arms.index(chain(int(w))) for w in widths] if "chain" in config.proposers else []
        if chains:
            uniform += float((tokens / times)[chains].max())
            ragged += best_ragged(survival, bs, widths, times[chains])
        commit, seconds, seen = world.step(decision.arm, survival, progress, decision.rule.splice)
        committed += sum(commit)
        policy.observe(decision, commit, seconds, seen if "lookup" in config.proposers else None)
        for rid in world.finished:
            policy.finish(rid)
    return Outcome(
        regret=1 - expected / best,
        rate=committed / elapsed,
        explored=lost / elapsed,
        switches=switches,
        ragged=ragged / uniform - 1 if uniform else 0.0,
        arms={arm: count / steps for arm, count in used.items()},
    )


def expected_tokens(
    world: World,
    survival: np.ndarray,
    progress: float,
    arms: Sequence[Arm],
    splice: int | None,
) -> np.ndarray:
    """True expected tokens of every arm, [arms].

    Args:
        splice: The least match whose look-up replaces drafts; None for the better of both.
    """
    drafts = np.cumsum(survival, axis=1)
    found = np.cumsum(world.look_ups(survival.shape[1]), axis=1)
    if splice is None:
        chains = np.maximum(drafts, found)
    else:
        chains = np.where((world.matches() >= splice)[:, None], found, drafts)
    by_proposer = {"plain": drafts, "chain": chains, "lookup": found}
    if trees := [arm.nodes for arm in arms if arm.proposer == "tree"]:
        by_proposer["tree"] = world.tree(progress, max(trees)).expected_tokens()
    return np.array([by_proposer[arm.proposer][:, arm.nodes - 1].sum() for arm in arms])


def best_ragged(survival: np.ndarray, bs: int, widths: np.ndarray, times: np.ndarray) -> float:
    """Best rate with a width per request, when only the number of verified tokens costs."""
    extra = np.sort(survival[:, 1:], axis=None)[::-1]
    tokens = bs + np.concatenate(([0.0], np.cumsum(extra)))
    seconds = np.interp(bs + np.arange(len(tokens)), bs * widths, times)
    # One draft pass serves whoever drafts; without drafted tokens there is none.
    seconds[0] = times[0]
    return float((tokens / seconds).max())


def run_fixed(scenario: Scenario, seed: int, arm: Arm, splice: int) -> float:
    """Tokens per second of one arm for the whole run."""
    world = World(scenario, seed)
    committed = elapsed = 0.0
    while elapsed < scenario.duration:
        progress = elapsed / scenario.duration
        world.admit(progress)
        elapsed += scenario.step_seconds(len(world.batch), arm, progress)
        commit, _, _ = world.step(arm, world.survival(progress), progress, splice)
        committed += sum(commit)
    return committed / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    scenarios.add_arguments(parser)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--proposers", nargs="+", default=["chain", "lookup"])
    args = parser.parse_args()

    config = AdaptiveConfig.for_block_size(args.block_size, proposers=args.proposers)
    seconds = scenarios.chosen(args, config.arms)
    splice = _FIXED_SPLICE if "lookup" in args.proposers else NEVER
    names = ", ".join(map(str, config.arms))
    print(f"step times: {args.table or args.shape + ' shape'}, arms {names}")
    print(f"{'scenario':32} regret  policy / best fixed  explored  switches  ragged gain  arms")
    regrets, ratios = [], []
    for scenario in scenarios.build(seconds, args.block_size, args.max_batch, args.steps):
        outcomes = [run(scenario, seed, config) for seed in range(args.seeds)]
        fixed = {
            arm: np.mean([run_fixed(scenario, seed, arm, splice) for seed in range(args.seeds)])
            for arm in config.arms
        }
        best = max(fixed, key=fixed.__getitem__)
        mean = {
            name: float(np.mean([getattr(o, name) for o in outcomes]))
            for name in ("regret", "rate", "explored", "switches", "ragged")
        }
        regrets.append(mean["regret"])
        ratios.append(mean["rate"] / fixed[best])
        print(
            f"{scenario.name:32} {mean['regret']:6.1%}  {ratios[-1]:7.3f} ({best!s:9})"
            f"   {mean['explored']:8.2%}  {mean['switches']:8.0f}  {mean['ragged']:11.1%}  "
            + " ".join(f"{share:.2f}" for share in outcomes[0].arms.values()),
            flush=True,
        )
    print(f"worst regret {max(regrets):.1%}; worst policy / best fixed {min(ratios):.3f}")


if __name__ == "__main__":
    main()
