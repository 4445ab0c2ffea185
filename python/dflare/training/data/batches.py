"""Batches and anchors, the same for every number of ranks and after every resume.

Everything here is a function of the seed, the epoch and the sequence: nothing is drawn from a
generator whose state would have to be saved or would depend on what a rank has seen.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dflare.training.data.corpus import Corpus

_SORT_WINDOW = 32  # batches among which sequences are sorted by length, so that little is padding


@dataclass(frozen=True)
class Batch:
    """Blocks of some sequences, on the device.

    Args:
        ids: ``[N, S]`` int64, padded at the end with 0.
        anchors: ``[N, A]`` int64, ascending; 0 for padding, which is not supervised.
        labels: ``[N, A, B-1]`` int64, the tokens of slots 1 .. B-1.
        supervised: ``[N, A, B-1]`` bool.
    """

    ids: Tensor
    anchors: Tensor
    labels: Tensor
    supervised: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, without waiting where that is possible."""
        return Batch(
            *(
                part.to(device, non_blocking=True)
                for part in (self.ids, self.anchors, self.labels, self.supervised)
            )
        )


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Order an epoch: random batches of sequences of similar length.

    Args:
        lengths: Tokens of each sequence.
        batch_size: Sequences a step over all ranks; what is left over at the end is not used,
            and a smaller corpus is one batch.
        seed: Of the run.
        epoch: From 0.

    Returns:
        Sequence indices of each batch.
    """
    rng = np.random.default_rng([seed, epoch])
    batch_size = min(batch_size, len(lengths))
    order = rng.permutation(len(lengths))
    window = batch_size * _SORT_WINDOW
    parts = [order[start : start + window] for start in range(0, len(order), window)]
    order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    count = len(order) // batch_size
    batches = [order[i * batch_size : (i + 1) * batch_size] for i in range(count)]
    return [batches[i] for i in rng.permutation(count)]


class Order:
    """Which sequences each step of a run takes.

    Args:
        lengths: Tokens of each sequence.
        batch_size: Sequences a step over all ranks.
        seed: Of the run.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch, self._batches = -1, [np.zeros(0, dtype=np.int64)]
        self.steps_per_epoch = max(1, len(lengths) // min(batch_size, len(lengths)))

    def step(self, number: int) -> tuple[int, np.ndarray]:
        """Return the epoch and the sequence indices of a step, both counted from 0."""
        epoch, position = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batches = epoch_batches(self._lengths, self._batch_size, self._seed, epoch)
            self._epoch = epoch
        return epoch, self._batches[position]


def draw_anchors(mask: np.ndarray, count: int, seed: list[int]) -> np.ndarray:
    """Draw anchors among the supervised tokens that a supervised token follows.

    Args:
        mask: ``[tokens]`` bool, supervised tokens of a sequence.
        count: Anchors wanted; all there are, if fewer.
        seed: Of this sequence in this epoch.

    Returns:
        Ascending positions.
    """
    candidates = np.flatnonzero(mask[:-1] & mask[1:])
    if len(candidates) > count:
        candidates = np.random.default_rng(seed).choice(candidates, count, replace=False)
        candidates.sort()
    return candidates


def make_batch(
    corpus: Corpus,
    indices: np.ndarray,
    anchors: int,
    block_size: int,
    seed: int,
    epoch: int,
    pad_to: int = 1,
) -> Batch:
    """Collect sequences and their blocks.

    A slot is supervised if its token and all tokens between it and the anchor are: beyond a turn
    of the user, or beyond the end, there is nothing that the drafter could know.

    Args:
        corpus: Where they are.
        indices: Which.
        anchors: A, blocks a sequence.
        block_size: B.
        seed: Of the run.
        epoch: From 0.
        pad_to: The width is a multiple of this, so that compiled code sees few shapes.

    Returns:
        The batch, on the CPU.
    """
    width = int(corpus.lengths[indices].max())
    width = -(-width // pad_to) * pad_to
    # Room for the slots of the last anchor, so that looking them up needs no case distinction.
    ids = np.zeros((len(indices), width + block_size), dtype=np.int64)
    mask = np.zeros((len(indices), width + block_size), dtype=bool)
    chosen = np.zeros((len(indices), anchors), dtype=np.int64)
    real = np.zeros((len(indices), anchors), dtype=bool)
    for row, index in enumerate(indices):
        tokens, supervised = corpus.tokens(index), corpus.mask(index)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = supervised
        drawn = draw_anchors(supervised, anchors, [seed, epoch, int(index)])
        # Padding first keeps the row ascending, which flex attention's mask profits from.
        chosen[row, anchors - len(drawn) :] = drawn
        real[row, anchors - len(drawn) :] = True
    slots = chosen[:, :, None] + np.arange(1, block_size)
    rows = np.arange(len(indices))[:, None, None]
    reached = np.logical_and.accumulate(mask[rows, slots], axis=-1) & real[:, :, None]
    return Batch(
        torch.from_numpy(ids[:, :width].copy()),
        torch.from_numpy(chosen),
        torch.from_numpy(ids[rows, slots]),
        torch.from_numpy(reached),
    )
