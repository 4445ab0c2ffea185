"""Training sequences in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dflare.training.data.files import read_header, read_records
from dflare.training.errors import ConfigError, DataError


@dataclass(frozen=True)
class Corpus:
    """Sequences in memory, end to end.

    Args:
        ids: ``[tokens]`` int32.
        supervised: ``[tokens]`` bool, the target wrote this token.
        offsets: ``[sequences + 1]`` int64, where each sequence starts.
    """

    ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        return np.diff(self.offsets)

    def tokens(self, index: int) -> np.ndarray:
        """Ids of one sequence."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def mask(self, index: int) -> np.ndarray:
        """Which tokens of one sequence are supervised."""
        return self.supervised[self.offsets[index] : self.offsets[index + 1]]

    def select(self, indices: Sequence[int] | np.ndarray) -> "Corpus":
        """Return some of the sequences."""
        return _join([self.tokens(int(i)) for i in indices], [self.mask(int(i)) for i in indices])

    def first(self, sequences: int) -> list[np.ndarray]:
        """Ids of the first sequences, at most so many."""
        return [self.tokens(i) for i in range(min(sequences, len(self)))]

    def fingerprint(self) -> str:
        """Identify the content, to notice that a resumed run got other data."""
        digest = hashlib.sha256(self.ids.tobytes())
        digest.update(self.supervised.tobytes())
        digest.update(self.offsets.tobytes())
        return digest.hexdigest()[:16]


def _join(ids: list[np.ndarray], masks: list[np.ndarray]) -> Corpus:
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in ids], out=offsets[1:])
    empty = [np.zeros(0, dtype=np.int32)]
    return Corpus(
        np.concatenate(ids or empty).astype(np.int32),
        np.concatenate(masks or empty).astype(bool),
        offsets,
    )


def load_corpus(paths: Sequence[Path], vocab_size: int, max_length: int) -> Corpus:
    """Load data files for a target.

    Args:
        paths: Files that `dflare synth` wrote, see :mod:`dflare.training.data.files`.
        vocab_size: The target's.
        max_length: Longer sequences are cut there.

    Returns:
        The sequences in which at least two tokens in a row are supervised: an anchor and a token
        to predict.

    Raises:
        DataError: A file that does not fit the target, or nothing to learn in any of them.
    """
    ids, masks, unsupervised = [], [], 0
    for path in paths:
        header = read_header(path)
        if header.get("vocab_size") != vocab_size:
            raise DataError(
                f"{path}: written with a vocabulary of {header.get('vocab_size')} "
                f"({header.get('target')}), the target has {vocab_size}; "
                "generate the data with this target"
            )
        for number, record in enumerate(read_records(path)):
            tokens = np.asarray(record.ids, dtype=np.int64)
            if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                raise DataError(
                    f"{path}: sequence {number}: ids {tokens.min()} to {tokens.max()} are not all "
                    f"in the target's vocabulary of {vocab_size}; "
                    "generate the data with this target"
                )
            mask = np.zeros(len(tokens), dtype=bool)
            for start, end in record.answers:
                mask[start:end] = True
            tokens, mask = tokens[:max_length], mask[:max_length]
            if (mask[1:] & mask[:-1]).any():
                ids.append(tokens)
                masks.append(mask)
            else:
                unsupervised += 1
    if not ids:
        raise DataError(
            f"{', '.join(map(str, paths)) or 'no files'}: nothing to learn: {unsupervised} "
            f"sequences, none with two supervised tokens in a row within {max_length} tokens; "
            "check the answers in the files and data.max_length"
        )
    return _join(ids, masks)


def split(corpus: Corpus, held_out: int) -> tuple[Corpus, Corpus]:
    """Set sequences aside, the same ones whatever their order: those whose content hashes lowest.

    Args:
        corpus: Everything.
        held_out: How many to set aside, at most half.

    Returns:
        Training and held-out sequences.
    """
    hashes = [hashlib.sha256(corpus.tokens(i).tobytes()).digest() for i in range(len(corpus))]
    ranked = sorted(range(len(corpus)), key=hashes.__getitem__)
    held = min(held_out, len(corpus) // 2)
    return corpus.select(sorted(ranked[held:])), corpus.select(sorted(ranked[:held]))


def check_mask_token(mask_token_id: int, corpus: Corpus, vocab_size: int) -> None:
    """Refuse a mask token that text holds: as an anchor it could not be told from a masked slot.

    Raises:
        ConfigError: Names a token that does not occur.
    """
    counts = np.bincount(corpus.ids, minlength=vocab_size)
    if counts[mask_token_id]:
        unused = np.flatnonzero(counts == 0)
        raise ConfigError(
            f"drafter.mask_token_id {mask_token_id} occurs {counts[mask_token_id]} times in the "
            "data; choose a token that text never holds, such as a reserved one"
            + (f" ({', '.join(map(str, unused[:5]))} do not occur)" if len(unused) else "")
        )
