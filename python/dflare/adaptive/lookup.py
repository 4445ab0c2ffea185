"""What look-ups were worth, step by step, and where they are better than the drafter."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

NEVER = 1 << 30  # a strength that no look-up has
_ALL = 1 << 30  # more tokens than any look-up has
LEAST_MATCH = 3  # tokens; shorter matches are chance
# First strength of each class; a class holds those up to the next.
_CLASSES = np.array([3, 4, 5, 6, 8, 10, 13, 17, 24, 33])
# What is assumed of each class before anything was seen: cases won by the look-up less those lost.
_PRIOR = np.array([-3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0])


class LookupRule(NamedTuple):
    """Which look-ups are verified.

    Attributes:
        splice: Least strength of one whose tokens stand in for the drafter's.
        odds: Where requests may differ, the least probability of a token that is verified without a
            draft pass, in thousandths.
    """

    splice: int = NEVER
    odds: int = 0


NO_LOOKUPS = LookupRule()


class Comparison(NamedTuple):
    """What proposals were worth in one step, used or not; int64 [bs] each.

    Attributes:
        match: Tokens before the look-up's proposal that occurred before it too; 0: it had none.
        right: Tokens of the look-up's proposal that were committed, up to the first other one.
        agreed: Tokens on which drafter and look-up agree, up to the first difference; -1 where
            nothing was drafted.
        drafted: Tokens of the drafter's proposal that were committed.
        worth: Tokens of the look-up's proposal that its rule would verify; where requests may not
            differ all.
    """

    match: Ints
    right: Ints
    agreed: Ints
    drafted: Ints
    worth: Ints | int = _ALL

    def strength(self) -> Ints:
        """How well a look-up is founded: its match, and what the drafter found too; 0 for none."""
        return np.where(self.match > 0, self.match + np.maximum(self.agreed, 0), 0)


class SpliceRule:
    """From which strength on the look-up's tokens stand in for the drafter's.

    At the first token on which both differ, behind tokens that were accepted, the committed one
    tells who was right, whichever was verified. Both counts by class of strength fade, so that the
    rule follows the workload.
    """

    def __init__(self, memory: int):
        """
        Args:
            memory: Steps in which a count fades to a third.
        """
        self._fade = np.exp(-1 / memory)
        self._won = np.zeros(len(_CLASSES))  # cases won by the look-up, less those lost

    def observe(self, seen: Comparison, drafts: int) -> None:
        """Learn from one step that drafted so many tokens a request."""
        differ = (seen.match > 0) & (seen.agreed >= 0) & (seen.agreed < drafts)
        won = differ & (seen.right > seen.agreed)
        lost = differ & (seen.drafted > seen.agreed)
        if not (won | lost).any():
            return
        classes = np.searchsorted(_CLASSES, seen.strength(), side="right") - 1
        self._won *= self._fade
        np.add.at(self._won, classes[won], 1.0)
        np.add.at(self._won, classes[lost], -1.0)

    def least_strength(self) -> int:
        """The strength from which on look-ups have won most, or `NEVER`."""
        gain = np.cumsum((self._won + _PRIOR)[::-1])[::-1]
        best = int(gain.argmax())
        return int(_CLASSES[best]) if gain[best] > 0 else NEVER
