"""Training text: JSONL with token ids, which of them are supervised, and how they were generated.

The first line describes the file, every other line is one sequence:

    {"dflare_data": 1, "target": "...", "vocab_size": 49152, "generation": {...}}
    {"ids": [1, 9690, ...], "loss": [[28, 49]], "finish": "stop"}

``loss`` lists half-open ranges of tokens that the target wrote; only they are learned. A name that
ends in ``.gz`` is compressed.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dflare.training.errors import ConfigError, DataError

FORMAT = 1


def open_text(path: Path, mode: str) -> IO[str]:
    """Open a text file, compressed if its name says so."""
    if path.suffix == ".gz":
        return gzip.open(path, mode + "t", encoding="utf-8")  # type: ignore[return-value]
    return path.open(mode, encoding="utf-8")


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Parse JSONL, with line numbers from 1; a last line that was cut short is left out.

    Raises:
        DataError: The file is missing, or a line other than the last is not a JSON object.
    """
    try:
        with open_text(path, "r") as lines:
            broken = None
            for number, line in enumerate(lines, 1):
                if broken is not None:
                    raise DataError(f"{path}:{broken}: not a JSON object; mend or remove the line")
                try:
                    content = json.loads(line)
                except json.JSONDecodeError:
                    broken = number
                    continue
                if not isinstance(content, dict):
                    raise DataError(f"{path}:{number}: not a JSON object; mend or remove the line")
                yield number, content
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_header(path: Path) -> dict[str, Any]:
    """Return the first line of a data file.

    Raises:
        DataError: Not a data file of a known format.
    """
    header = next(read_lines(path), (1, {}))[1]
    if header.get("dflare_data") != FORMAT:
        raise DataError(
            f"{path}: not training data of format {FORMAT}: the first line must hold "
            f'"dflare_data": {FORMAT}; `dflare synth` writes such files'
        )
    return header


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
        paths: Files of this module's format.
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
        for number, record in read_lines(path):
            if number == 1:
                continue
            try:
                tokens = np.asarray(record["ids"], dtype=np.int64)
                spans = [(int(start), int(end)) for start, end in record["loss"]]
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f'{path}:{number}: a sequence has "ids" and "loss" ranges ({error!r})'
                ) from error
            if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                raise DataError(
                    f"{path}:{number}: ids {tokens.min()} to {tokens.max()} are not all in "
                    f"the target's vocabulary of {vocab_size}; "
                    "generate the data with this target"
                )
            mask = np.zeros(len(tokens), dtype=bool)
            for start, end in spans:
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
            'check "loss" in the files and data.max_length'
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
