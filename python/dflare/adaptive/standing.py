"""How long a decision stands."""

from collections.abc import Hashable, Sequence


class Standing:
    """A decision stands for some steps of the same requests, while one of them has room for it.

    What ends it every tensor-parallel rank sees for itself.

    Attributes:
        left: Further steps for which it stands.
    """

    def __init__(self) -> None:
        self.left = 0
        self._requests: tuple[Hashable, ...] = ()
        self._nodes = 0

    def begin(self, requests: tuple[Hashable, ...], nodes: int, steps: int) -> None:
        """A decision was made.

        Args:
            requests: Ids of the batch.
            nodes: Tokens of a request that its steps verify.
            steps: For how many it stands, the one that runs now included.
        """
        self._requests, self._nodes, self.left = requests, nodes, steps - 1

    def goes_on(self, requests: tuple[Hashable, ...], remaining: Sequence[int]) -> bool:
        """Whether it stands for one more step, which is counted.

        Args:
            requests: Ids of the batch.
            remaining: Tokens that each may still produce.
        """
        stands = self.left and self._requests == requests and self._nodes <= max(remaining)
        self.left -= bool(stands)
        return bool(stands)
