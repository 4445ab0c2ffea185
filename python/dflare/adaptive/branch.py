"""How likely a look-up's tokens are right: what lets them compete with the drafter's in a tree."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_LONGEST = 16  # matches beyond it are one class
_WEIGHT = 8.0  # observations that the prior of a class is worth


class BranchOdds:
    """Learns from every step how often a token is right behind a match of so many tokens.

    The first token of a look-up stands behind its match; the second, if the first was right, behind
    one token more. Tokens that were not reached teach nothing. What is learned depends on accepted
    tokens alone, so that tensor-parallel ranks agree without a word.
    """

    def __init__(self, memory: int = 3000) -> None:
        """
        Args:
            memory: Observed tokens after which a count has faded to a third.
        """
        length = np.arange(_LONGEST + 1)
        prior = 1 - 0.6 * 0.85**length  # 0.6 right behind 3 tokens, 0.88 behind 10
        self._right, self._seen = _WEIGHT * prior, np.full(_LONGEST + 1, _WEIGHT)
        self._prior = self._right.copy()
        self._fade = np.exp(-1 / memory)

    def log_probs(self, matches: npt.ArrayLike, count: int) -> Floats:
        """Log-probability of each token of look-ups, given that those before it are right.

        Args:
            matches: [bs] tokens of each match.
            count: Tokens of a look-up, L.

        Returns:
            [bs, L].
        """
        effective = np.minimum(np.asarray(matches)[:, None] + np.arange(count), _LONGEST)
        return np.log(self._right / self._seen)[effective].astype(np.float32)

    def observe(
        self, matches: Sequence[int], proposed: Sequence[int], right: Sequence[int]
    ) -> None:
        """Learn from a step.

        Args:
            matches: [bs] tokens of each match.
            proposed: [bs] tokens of each look-up of which it is known whether they were right up to
                the first wrong one; 0 teaches nothing.
            right: [bs] how many of them were right before the first wrong one.
        """
        for match, shown, hits in zip(matches, proposed, right, strict=True):
            for token in range(min(hits + 1, shown)):
                self._fade_by_one()
                length = min(match + token, _LONGEST)
                self._seen[length] += 1
                self._right[length] += token < hits

    def _fade_by_one(self) -> None:
        self._right = self._prior + (self._right - self._prior) * self._fade
        self._seen = _WEIGHT + (self._seen - _WEIGHT) * self._fade
