"""Training data on disk: token ids, which of them are supervised, and how they were generated.

A file is a row of xz streams. The first holds a JSON object: format, target, vocabulary, settings
of the generation. Each other one is a NumPy archive of sequences:

    ids      [tokens]     uint16 or uint32, the sequences end to end
    lengths  [sequences]  uint32, tokens of each
    answers  [ranges, 2]  uint32, half-open ranges within a sequence that the target wrote
    ranges   [sequences]  uint16, how many of them each sequence has
    keys     [sequences]  uint64, which prompt was answered
    cut      [sequences]  bool, the last answer was cut for its length
    steps    [sequences]  uint32, verify steps that the answer took where it was served with a
                          drafter, else 0; files of older versions have none

Streams are appended while data is generated, so that an interruption loses what is not yet in
one; a stream that was cut short is left out. One stream of everything takes about 0.7 bytes a
token, many small ones about 0.9.
"""

import hashlib
import io
import json
import lzma
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dflare.training.errors import ConfigError, DataError

FORMAT = 2
_STREAM_SEQUENCES, _STREAM_SECONDS = 256, 60.0  # after which a stream is written


@dataclass(frozen=True)
class Record:
    """One conversation.

    Args:
        ids: Its tokens.
        answers: Half-open ranges of them that the target wrote.
        key: Identifies the prompt.
        cut: The last answer was cut for its length.
        steps: Verify steps that the last answer took, 0 where it was not drafted.
    """

    ids: Sequence[int] | np.ndarray
    answers: Sequence[tuple[int, int]]
    key: int = 0
    cut: bool = False
    steps: int = 0


def prompt_key(content: bytes) -> int:
    """Identify a prompt by 64 bits."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def _pack(records: Sequence[Record], wide: bool) -> bytes:
    ids: list[np.ndarray] = [np.asarray(record.ids) for record in records]
    content = io.BytesIO()
    np.savez(
        content,
        ids=np.concatenate(ids).astype(np.uint32 if wide else np.uint16),
        lengths=np.array([len(part) for part in ids], np.uint32),
        answers=np.array([r for record in records for r in record.answers], np.uint32).reshape(
            -1, 2
        ),
        ranges=np.array([len(record.answers) for record in records], np.uint16),
        keys=np.array([record.key for record in records], np.uint64),
        cut=np.array([record.cut for record in records], bool),
        steps=np.array([record.steps for record in records], np.uint32),
    )
    return lzma.compress(content.getvalue(), preset=9)


def _unpack(stream: bytes) -> Iterator[Record]:
    part = np.load(io.BytesIO(stream))
    ids, answers, ranges = part["ids"], part["answers"], part["ranges"]
    at, first = 0, 0
    steps = part.get("steps", np.zeros(len(ranges), np.uint32))
    for length, count, key, cut, taken in zip(
        part["lengths"], ranges, part["keys"], part["cut"], steps, strict=True
    ):
        own = [(int(a), int(b)) for a, b in answers[first : first + count]]
        yield Record(ids[at : at + length], own, int(key), bool(cut), int(taken))
        at, first = at + int(length), first + int(count)


def _streams(path: Path) -> Iterator[tuple[int, bytes]]:
    """Return each whole stream, with where it ends in the file."""
    try:
        content = path.read_bytes()
        left = content
        while left:
            one = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            stream = one.decompress(left)
            if not one.eof:
                return  # an interruption cut it short
            left = one.unused_data
            yield len(content) - len(left), stream
    except (OSError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_header(path: Path) -> dict[str, Any]:
    """Return what a data file says of itself.

    Raises:
        DataError: Not a data file of this format.
    """
    for _, stream in _streams(path):
        try:
            header = json.loads(stream)
        except ValueError:
            break
        if isinstance(header, dict) and header.get("dflare_data") == FORMAT:
            return header
        break
    raise DataError(
        f"{path}: not training data of format {FORMAT}; `dflare synth` writes such files"
    )


def read_records(path: Path) -> Iterator[Record]:
    """Return the conversations of a data file.

    Raises:
        DataError: Not a data file, or a damaged one.
    """
    read_header(path)
    for number, (_, stream) in enumerate(_streams(path)):
        if number:
            try:
                yield from _unpack(stream)
            except (KeyError, ValueError, OSError) as error:
                raise DataError(f"{path}: stream {number} is damaged ({error})") from error


def write_records(path: Path, header: dict[str, Any], records: Iterable[Record]) -> None:
    """Write a whole data file as one stream, replacing one that is there.

    Args:
        path: The file.
        header: ``target``, ``vocab_size`` and whatever else should be known of the data.
        records: Conversations.
    """
    header = {"dflare_data": FORMAT, **header}
    content = lzma.compress(json.dumps(header).encode())
    everything = list(records)
    if everything:
        content += _pack(everything, header["vocab_size"] > 2**16)
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content)
    partial.replace(path)


class DataFile:
    """A data file that grows, and is continued where it was left.

    Args:
        path: The file.
        header: As for :func:`write_records`; a file that is there must have the same.

    Raises:
        ConfigError: The file was made with other settings.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path, self._header = path, {"dflare_data": FORMAT, **header}
        self._wide = header["vocab_size"] > 2**16
        if path.exists() and path.stat().st_size:
            old = read_header(path)
            if old != self._header:
                raise ConfigError(
                    f"{path}: was made with other settings ({old}); these are {self._header}. Name "
                    "another file, or give the settings it was made with to go on"
                )
            end = max(end for end, _ in _streams(path))
            with path.open("r+b") as file:
                file.truncate(end)
        else:
            write_records(path, header, [])
        self.keys = {record.key for record in read_records(path)}
        self._open: list[Record] = []
        self._written = time.monotonic()

    def add(self, record: Record) -> None:
        """Add a conversation; it is on disk within a minute, or 256 conversations."""
        self._open.append(record)
        self.keys.add(record.key)
        waited = time.monotonic() - self._written
        if len(self._open) >= _STREAM_SEQUENCES or waited > _STREAM_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last stream."""
        if self._open:
            try:
                with self._path.open("ab") as file:
                    file.write(_pack(self._open, self._wide))
            except OSError as error:
                raise DataError(
                    f"{self._path}: cannot be written ({error}); make room and give the same "
                    "command again, it goes on with what is there"
                ) from error
        self._open, self._written = [], time.monotonic()

    def close(self) -> None:
        """Write what is open, and everything anew as one stream."""
        self.flush()
        write_records(self._path, self._header, read_records(self._path))
