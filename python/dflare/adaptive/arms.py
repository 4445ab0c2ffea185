"""What a decode step can be: who proposes tokens, and how many of them the target verifies."""

from typing import NamedTuple


class Arm(NamedTuple):
    """One way to run a decode step.

    Attributes:
        proposer: ``plain`` (nobody), ``chain`` (the drafter, and the look-up where it is better),
            ``lookup`` (the text so far alone, without a draft pass) or ``tree`` (the drafter's best
            prefixes, and the look-up as one more branch).
        nodes: Tokens of a request that the target verifies: the anchor, and all that is proposed.
    """

    proposer: str
    nodes: int

    def __str__(self) -> str:
        return f"{self.proposer} {self.nodes}"


PLAIN = Arm("plain", 1)


def chain(nodes: int) -> Arm:
    """The arm that verifies the drafter's first ``nodes - 1`` tokens."""
    return Arm("chain", nodes) if nodes > 1 else PLAIN
