"""A reduced vocabulary for the loss: most of a small drafter's step is the product with the head.

The rows of a step are the most frequent tokens of the data, some others drawn anew each step, and
every label of the step. All ranks choose the same rows: the labels of the whole step are known to
each of them. The drawn rows stand for all that are left out: log of how many, added to their
logits, makes the sum of their exponentials an unbiased estimate of that of all (sampled softmax,
Bengio and Senecal 2008). Accuracies with a reduced vocabulary are still a little too good;
validation always uses all tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dflare.training.data.corpus import Corpus


@dataclass(frozen=True)
class LossHead:
    """The head as a loss looks at it.

    Args:
        weight: ``[V', H]``, rows of the target's head.
        rows: ``[V']`` int64 ascending, which those are; none for all.
        log_weight: ``[V']`` float32, added to the logits: log of the tokens that a row stands for;
            none for one each.
    """

    weight: Tensor
    rows: Tensor | None = None
    log_weight: Tensor | None = None


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

    def rows(self, sequences: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Choose for a step over these sequences of the corpus.

        Returns:
            The ascending rows, and for each the log of how many tokens it stands for.
        """
        labels = [self._corpus.tokens(i)[self._corpus.mask(i)] for i in sequences]
        rng = np.random.default_rng([self._seed, step])
        drawn = rng.integers(self._vocab_size, size=self._random)
        certain = np.unique(np.concatenate([self._frequent, *labels]))
        rows = np.union1d(certain, drawn)
        by_chance = ~np.isin(rows, certain)
        log_weight = np.zeros(len(rows), np.float32)
        if by_chance.any():
            log_weight[by_chance] = np.log((self._vocab_size - len(certain)) / by_chance.sum())
        return rows, log_weight

    def head(self, head: Tensor, sequences: np.ndarray, step: int) -> LossHead:
        """Take these rows out of the target's head ``[V, H]``."""
        rows, log_weight = (
            torch.from_numpy(part).to(head.device) for part in self.rows(sequences, step)
        )
        chosen = LossHead(head[rows], rows, log_weight)
        # How many they are differs from step to step; compiled for one size, each is compiled anew.
        for part in (chosen.weight, log_weight):
            torch._dynamo.maybe_mark_dynamic(part, 0)
        return chosen
