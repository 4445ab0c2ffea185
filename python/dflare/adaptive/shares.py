"""How the nodes of a tree step are shared out: the most probable first, whoever's they are."""

import numpy as np
import numpy.typing as npt

_PER_NAT = 10  # classes of log-probabilities
_CLASSES = 60  # anything below exp(-6) is not worth verifying
_MEMORY = 128  # requests' steps in which what was seen fades to a third
_AT_ONCE = 32  # of them: to learn takes as long from all as from one


class NodePrices:
    """From which probability on nodes are verified, for a wanted number of a request.

    The nodes of all requests compete, and with those of the steps before: a step of confident
    drafts verifies more than one of doubtful ones, and so many only in the mean. At equal cost
    no other choice accepts more (the nodes' probabilities are prefix products, which add up to
    the expected accepted tokens), as long as a further node costs the same whosoever it is.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_CLASSES)  # of nodes by log-probability, from 0 down
        self._requests = 0.0
        self._noted: list[npt.NDArray[np.float32]] = []  # what nothing was learned from yet
        self._least: dict[float, float] = {}  # prices that were asked for since

    def observe(self, log_probs: npt.NDArray[np.float32]) -> None:
        """Note what a step could verify.

        Args:
            log_probs: [bs, n] of the nodes that its requests could have.
        """
        self._noted.append(log_probs)
        requests = sum(map(len, self._noted))
        if self._requests and requests < _AT_ONCE:
            return
        noted = np.concatenate([x.ravel() for x in self._noted])
        classes = np.minimum(noted * -_PER_NAT, _CLASSES).astype(np.int64)
        seen = np.bincount(classes, minlength=_CLASSES + 1)[:_CLASSES]
        kept = np.exp(-requests / _MEMORY)
        self._counts = kept * self._counts + seen
        self._requests = kept * self._requests + requests
        self._noted, self._least = [], {}

    def least(self, nodes: float) -> float:
        """The log-probability from which on a request has so many nodes in the mean.

        Args:
            nodes: Drafted ones.
        """
        if nodes not in self._least:
            self._least[nodes] = self._price(nodes)
        return self._least[nodes]

    def _price(self, nodes: float) -> float:
        up_to = np.cumsum(self._counts) / max(self._requests, 1e-9)
        wanted = int(np.searchsorted(up_to, nodes))
        if wanted == _CLASSES:
            return -_CLASSES / _PER_NAT
        before = up_to[wanted - 1] if wanted else 0.0
        part = (nodes - before) / max(up_to[wanted] - before, 1e-9)
        return -(wanted + min(float(part), 1.0)) / _PER_NAT
