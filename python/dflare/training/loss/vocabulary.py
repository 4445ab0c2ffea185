"""A reduced vocabulary for the loss: most of a small drafter's step is the product with the head.

The rows of a step are the most frequent tokens of the data, some others drawn anew each step, and
every label of the step. All ranks choose the same rows: the labels of the whole step are known to
each of them. Tokens left out count as impossible, so losses and accuracies with a reduced
vocabulary are a little too good; validation always uses all tokens.
"""

import numpy as np

from dflare.training.data.corpus import Corpus


class LossVocabulary:
    """Chooses the rows of the head that a step's loss looks at.

    Args:
        corpus: Training data, for frequencies and labels.
        vocab_size: V.
        frequent: Rows that are always there.
        random: Rows drawn each step.
        seed: Of the run.
    """

    def __init__(
        self, corpus: Corpus, vocab_size: int, frequent: int, random: int, seed: int
    ) -> None:
        counts = np.bincount(corpus.ids[corpus.supervised], minlength=vocab_size)
        self._frequent = np.argsort(-counts, kind="stable")[:frequent]
        self._corpus, self._vocab_size = corpus, vocab_size
        self._random, self._seed = random, seed

    def rows(self, sequences: np.ndarray, step: int) -> np.ndarray:
        """Return the ascending rows for a step over these sequences of the corpus."""
        labels = [self._corpus.tokens(i)[self._corpus.mask(i)] for i in sequences]
        rng = np.random.default_rng([self._seed, step])
        drawn = rng.integers(self._vocab_size, size=self._random)
        return np.unique(np.concatenate([self._frequent, drawn, *labels]))
