"""A policy that takes arms in turn, whatever they bring, so that tests know which steps ran."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from dflare.adaptive import (
    LEAST_MATCH,
    NEVER,
    PLAIN,
    AdaptiveConfig,
    Arm,
    ArmPolicy,
    CostTable,
    Decision,
    LookupRule,
    StepTime,
    chain,
)

# A width of the drafter's chain; or `lookup`, a look-up alone, `spliced`, one that replaces drafted
# tokens wherever it finds any, or `tree`, and the tokens that are verified.
Turn = int | Sequence[str | int]


def _decision(turn: Turn, block_size: int) -> tuple[Arm, int]:
    """Arm and least strength of a turn, cut to the block."""
    if isinstance(turn, int):
        return chain(min(turn, block_size)), NEVER
    proposer, width = turn
    width = min(int(width), block_size if proposer == "spliced" else 2 * block_size)
    return (
        (chain(width), LEAST_MATCH) if proposer == "spliced" else (Arm(str(proposer), width), NEVER)
    )


def configuration(turns: Sequence[Turn], block_size: int) -> AdaptiveConfig:
    """What a worker must be ready for to take these turns."""
    decisions = [_decision(turn, block_size) for turn in turns]
    trees = sorted({arm.nodes for arm, _ in decisions if arm.proposer == "tree"})
    lookups = sorted({arm.nodes for arm, _ in decisions if arm.proposer == "lookup"})
    others = {arm.nodes for arm, _ in decisions if arm.proposer != "tree"}
    named = {str(turn[0]) for turn in turns if not isinstance(turn, int)}
    proposers = ["chain"]
    proposers += ["lookup"] if named & {"lookup", "spliced"} else []
    proposers += ["tree"] if trees else []
    return AdaptiveConfig.for_block_size(
        block_size,
        widths=sorted({1, block_size, *(nodes for nodes in others if nodes <= block_size)}),
        proposers=proposers,
        trees=trees,
        lookups=lookups,
    )


def _nearest(arm: Arm, built: Sequence[Arm]) -> Arm:
    """The largest arm that the worker is ready for, of the same proposer and no larger."""
    return max(other for other in built if other.proposer == arm.proposer and other <= arm)


class ScriptedPolicy(ArmPolicy):
    """Takes the turns, cyclic; no step times are measured for it."""

    standing = 1

    def __init__(
        self,
        config: AdaptiveConfig,
        turns: Sequence[Turn],
        ran: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """
        Args:
            ran: is told the width of each step and for how many requests.
        """
        super().__init__(config, CostTable(config.arms, [StepTime(1, PLAIN, 0.001)], 1))
        self._built, self._largest = config.arms, config.widths[-1]
        self._ran = ran
        self.take(turns)

    def take(self, turns: Sequence[Turn]) -> None:
        """Go on with other turns, of what the worker is ready for."""
        decisions = (_decision(turn, self._largest) for turn in turns)
        script = [(_nearest(arm, self._built), splice) for arm, splice in decisions]
        self._script = itertools.cycle(script)

    def choose(self, request_ids, remaining) -> Decision:
        decision = super().choose(request_ids, remaining)
        arm, splice = next(self._script)
        self._ran(arm.nodes, len(request_ids))
        return dataclasses.replace(decision, arm=arm, rule=LookupRule(splice))
