"""What arms are worth on what a drafter really accepts, without the noise of a machine.

    python -m bench.policy.replay DRAFTER [--target demo] [--tokens 96] [--table steps.json]

The target answers the benchmark's prompts; then the drafter proposes a block, and the text so far
a look-up, at every single position of the answers. Greedy verification commits the same text
however it was drafted, so these lengths say what any sequence of arms would have committed. The
policy, with all proposers and with chains alone, every fixed arm, and CaDDTree's choice of a budget
(arXiv 2606.01813) serve the same requests against given step times. The policy starts knowing
nothing each time; CaDDTree knows the true step times, and of acceptance what the drafter says.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from bench.policy import scenarios
from dflare.adaptive import (
    NEVER,
    PLAIN,
    AdaptiveConfig,
    Arm,
    ArmPolicy,
    Comparison,
    Decision,
    NodePrices,
)
from dflare.branch import BranchOdds
from dflare.training.data.generate import Generator, Sampling
from dflare.training.data.prompts import encode, read_prompts, stop_tokens
from dflare.training.data.target import load_target, target_path
from dflare.training.drafter.export import load_drafter
from dflare.training.drafter.model import Drafter
from dflare.training.run.draft_table import Nodes, draft_table
from dflare.training.run.look_ups import look_ups

PROMPTS = Path(__file__).parents[1] / "serving" / "prompts"
_TABLE_ERROR = 0.05  # of a start-up measurement
_STEP_NOISE = 0.05


@dataclass(frozen=True)
class Trace:
    """What proposals are worth behind each token of one answer.

    Attributes:
        seen: Of the drafter's whole block and of the look-up, int64 [anchors] each.
        trees: The drafter's trees.
        branched: The same with the look-up as one more branch.
        chance: Of the look-up's tokens to be right with all before them, as far as matches of their
            length have been so far, [anchors, nodes - 1].
    """

    seen: Comparison
    trees: Nodes
    branched: Nodes
    chance: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.seen.match)

    def accepted(self, at: int, proposer: str, splice: int, nodes: int) -> int:
        """Right drafts behind an anchor, of so many verified tokens.

        Look-ups join only where `splice` is one of theirs.
        """
        seen = self.seen
        if proposer == "tree":
            trees = self.trees if splice == NEVER else self.branched
            return int(trees.right[at, : nodes - 1].sum())
        if proposer == "chain":
            found = seen.match[at] > 0 and seen.match[at] + seen.agreed[at] >= splice
            return min(int((seen.right if found else seen.drafted)[at]), nodes - 1)
        return min(int(seen.right[at]), nodes - 1) if proposer == "lookup" else 0


@torch.no_grad()
def record(
    drafter: Drafter, target_name: str, tokens: int, nodes: int, most: int
) -> dict[str, list[Trace]]:
    """Traces of the answers to each prompt file.

    Args:
        tokens: Of an answer.
        nodes: Of trees.
        most: Prompts of a file.
    """
    path = target_path(target_name)
    target = load_target(path, drafter.config.target_layer_ids)
    tokenizer = AutoTokenizer.from_pretrained(path)
    stops = stop_tokens(tokenizer, target.model.generation_config)
    odds = BranchOdds()
    traces = {}
    for file in sorted(PROMPTS.glob("*.jsonl")):
        prompts = [encode(tokenizer, messages) for messages in read_prompts(file)][:most]
        generator = Generator(target, 48, 1024, Sampling(max_new_tokens=tokens, stop_ids=stops))
        traces[file.stem] = []
        for answer in generator.run(prompts):
            if len(answer.ids) < 2:
                continue
            table = draft_table(target, drafter, prompts[answer.prompt], answer.ids)
            found = look_ups(prompts[answer.prompt], answer.ids, nodes - 1)
            branches = found.branches(odds)
            chance = branches[1].cumsum(1).exp() * (found.match > 0)[:, None]
            traces[file.stem].append(
                Trace(
                    table.compare(found),
                    table.grow(nodes - 1),
                    table.grow(nodes - 1, branches),
                    chance.numpy(),
                )
            )
            found.teach(odds)
    return traces


@dataclass
class _Request:
    rid: int
    trace: Trace
    at: int = 0

    @property
    def left(self) -> int:
        return len(self.trace) - self.at


class Fixed:
    """One arm for the whole run."""

    def __init__(self, arm: Arm, splice: int = NEVER) -> None:
        self.arm, self.splice = arm, splice

    def choose(self, _batch: Sequence[_Request]) -> tuple[Arm, int]:
        return self.arm, self.splice

    def nodes(self, batch: Sequence[_Request], arm: Arm) -> list[int]:
        """Tokens that each request verifies."""
        return [arm.nodes] * len(batch)

    def learn(
        self, batch: Sequence[_Request], commits: list[int], seconds: float, verified: int
    ) -> None:
        """Nothing."""


class CostAware(Fixed):
    """CaDDTree: the budget with the most expected tokens a second, by the drafter's own word."""

    def __init__(self, budgets: Sequence[int], seconds: scenarios.Seconds) -> None:
        super().__init__(PLAIN)
        self._budgets, self._seconds = budgets, seconds

    def choose(self, batch: Sequence[_Request]) -> tuple[Arm, int]:
        def rate(nodes: int) -> float:
            chances = (r.trace.trees.chance[r.at, : nodes - 1] for r in batch)
            hoped = len(batch) + sum(float(chance.sum()) for chance in chances)
            return hoped / self._seconds(len(batch), Arm("tree", nodes))

        return Arm("tree", max(self._budgets, key=rate)), NEVER


class Policy(Fixed):
    """The policy as a server runs it, from measured step times on."""

    def __init__(
        self, config: AdaptiveConfig, seconds: scenarios.Seconds, largest: int, seed: int
    ) -> None:
        table = scenarios.start_up_table(seconds, config.arms, largest, _TABLE_ERROR, [seed, 1])
        super().__init__(PLAIN)
        self._policy, self._config, self._prices = ArmPolicy(config, table), config, NodePrices()
        self._looks_up = "lookup" in config.proposers
        self._noise = np.random.default_rng(seed)
        self._decision: Decision | None = None

    def choose(self, batch: Sequence[_Request]) -> tuple[Arm, int]:
        decision = self._policy.choose([r.rid for r in batch], [r.left for r in batch])
        self._decision = decision
        # Trees take look-ups as branches whatever the rule for chains says.
        branches = self._looks_up and decision.arm.proposer == "tree"
        return decision.arm, 0 if branches else decision.rule.splice

    def _worth(self, batch: Sequence[_Request]) -> npt.NDArray[np.int64]:
        assert self._decision
        least = self._decision.rule.odds / 1000
        return np.array([int((r.trace.chance[r.at] >= least).sum()) for r in batch])

    def nodes(self, batch: Sequence[_Request], arm: Arm) -> list[int]:
        most = self._config.most(arm)
        if not self._config.ragged or arm.proposer not in ("tree", "lookup"):
            return [arm.nodes] * len(batch)
        if arm.proposer == "lookup":
            return (1 + self._worth(batch)).tolist()
        if arm.nodes == most:
            return [most] * len(batch)
        grown = ((r.trace.branched if self._looks_up else r.trace.trees, r.at) for r in batch)
        chances = np.stack([nodes.chance[at, : most - 1] for nodes, at in grown])
        with np.errstate(divide="ignore"):
            log_probs = np.log(chances)
        self._prices.observe(log_probs)
        return (1 + (log_probs >= self._prices.least(arm.nodes - 1)).sum(1)).tolist()

    def learn(
        self, batch: Sequence[_Request], commits: list[int], seconds: float, verified: int
    ) -> None:
        """Before the batch goes on."""
        assert self._decision
        seconds *= self._noise.lognormal(0.0, _STEP_NOISE)
        seen = _seen(batch, commits, self._decision.arm) if self._looks_up else None
        if seen and self._config.ragged:
            seen = seen._replace(worth=self._worth(batch))
        self._policy.observe(self._decision, commits, seconds, seen, verified)
        for request, commit in zip(batch, commits, strict=True):
            if request.left == commit:
                self._policy.finish(request.rid)


def _seen(batch: Sequence[_Request], commits: list[int], arm: Arm) -> Comparison:
    """What a step shows of look-ups and of the drafter."""
    match, right, agreed, drafted = np.array(
        [[values[r.at] for values in r.trace.seen[:4]] for r in batch], dtype=np.int64
    ).T
    if arm.proposer != "chain":
        agreed, drafted = np.full_like(match, -1), np.zeros_like(match)
    return Comparison(match, np.minimum(right, commits), agreed, np.minimum(drafted, commits))


def serve(
    traces: Sequence[Trace],
    concurrency: int,
    seconds: scenarios.Seconds,
    chooser: Fixed,
) -> float:
    """Tokens per second, with so many requests at a time."""
    waiting = [_Request(rid, trace) for rid, trace in enumerate(traces)][::-1]
    batch: list[_Request] = []
    elapsed, tokens = 0.0, 0
    while waiting or batch:
        while waiting and len(batch) < concurrency:
            batch.append(waiting.pop())
        arm, splice = chooser.choose(batch)
        nodes = chooser.nodes(batch, arm)
        took = seconds(len(batch), Arm(arm.proposer, sum(nodes) / len(batch)))
        commits = [
            min(r.trace.accepted(r.at, arm.proposer, splice, n) + 1, r.left)
            for r, n in zip(batch, nodes, strict=True)
        ]
        chooser.learn(batch, commits, took, sum(nodes))
        for request, commit in zip(batch, commits, strict=True):
            request.at += commit
        elapsed, tokens = elapsed + took, tokens + sum(commits)
        batch = [request for request in batch if request.left]
    return tokens / elapsed


def shuffled(pool: list[Trace], count: int, seed: int) -> list[Trace]:
    """So many traces, every one as often as the others."""
    rng, drawn = random.Random(seed), list[Trace]()
    while len(drawn) < count:
        drawn += rng.sample(pool, len(pool))
    return drawn[:count]


def rates(
    pool: list[Trace],
    concurrency: int,
    seconds: scenarios.Seconds,
    block_size: int,
    seeds: int,
) -> dict[str, float]:
    """Mean tokens per second of every fixed arm by its name, of CaDDTree and of the policies."""
    every = AdaptiveConfig.for_block_size(block_size)
    chains = AdaptiveConfig.for_block_size(block_size, proposers=["chain"])
    trees = AdaptiveConfig.for_block_size(block_size, proposers=["chain", "tree"])
    shared = every.sharing(block_size, 2 * block_size)
    policies = {"chains": chains, "chains, trees": trees, "all": every, "shared": shared}
    choosers: dict[str, Callable[[int], Fixed]] = {
        str(arm): lambda _, arm=arm: Fixed(arm) for arm in every.arms
    }
    choosers["CaDDTree"] = lambda _: CostAware(every.trees, seconds)
    for name, config in policies.items():
        choosers[name] = lambda seed, config=config: Policy(config, seconds, concurrency, seed)
    found: dict[str, list[float]] = {name: [] for name in choosers}
    for seed in range(seeds):
        requests = shuffled(pool, 9 * max(concurrency, 4), seed)
        for name, make in choosers.items():
            found[name].append(serve(requests, concurrency, seconds, make(seed)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("drafter", help="checkpoint folder")
    parser.add_argument("--target", default="demo")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--prompts", type=int, default=48, help="of each file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--seeds", type=int, default=3)
    scenarios.add_arguments(parser)
    args = parser.parse_args()

    drafter = load_drafter(args.drafter)
    block = drafter.config.block_size
    every = AdaptiveConfig.for_block_size(block)
    traces = record(drafter, args.target, args.tokens, every.trees[-1], args.prompts)
    traces["mix"] = [trace for pool in traces.values() for trace in pool]
    seconds = scenarios.chosen(args, every.arms)
    names = ", ".join(map(str, every.arms))
    print(f"step times: {args.table or args.shape + ' shape'}, arms {names}")
    print("the policy with all proposers (and nodes that requests share), over chains alone")
    for name, pool in traces.items():
        for concurrency in args.batches:
            rate = rates(pool, concurrency, seconds, block, args.seeds)

            def best(who: str, rate: dict[str, float] = rate) -> Arm:
                arms = [arm for arm in every.arms if arm.proposer in (who, "plain")]
                return max(arms, key=lambda arm: rate[str(arm)])

            chains, trees = (rate[str(best(who))] for who in ("chain", "tree"))
            print(
                f"{name:5} {concurrency:3} at a time: all {rate['all'] / rate['chains']:.3f}, "
                f"shared {rate['shared'] / rate['chains']:.3f}, "
                f"trees {rate['chains, trees'] / rate['chains']:.3f}; "
                f"over the best chain ({best('chain')}): chains {rate['chains'] / chains:.3f}; "
                f"over the best tree ({best('tree')}): CaDDTree {rate['CaDDTree'] / trees:.3f}, "
                f"trees {rate['chains, trees'] / trees:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
