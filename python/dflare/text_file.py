"""Text that a user wrote: errors give the line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dflare.errors import DFlareError


def read_text(path: Path, error: type[DFlareError]) -> str:
    """Read a UTF-8 file.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        DFlareError: `error`; it cannot be read, or a line is not UTF-8.
    """
    return "".join(text for _, text in read_text_lines(path, error))


def read_text_lines(path: Path, error: type[DFlareError]) -> Iterator[tuple[int, str]]:
    """Read the lines of a UTF-8 file with their numbers.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        DFlareError: `error`; it cannot be read, or a line is not UTF-8.
    """
    number = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield number, line.decode("utf-8")
    except UnicodeDecodeError as cause:
        byte = cause.object[cause.start]
        raise error(
            f"{path}, line {number}: byte {byte:#04x} at {cause.start} is not UTF-8 text; give a "
            "text file, or save this one as UTF-8"
        ) from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause})") from cause


def parse_json_line(line: str) -> Any:
    """Parse a line of JSON whose text can be encoded.

    Raises:
        ValueError: not JSON, or half a surrogate pair (`"\\ud83d"`), which is no character.
    """
    content = json.loads(line)
    if "\\ud" not in line.lower():
        return content
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ValueError(f"\\u{half:04x} is half a surrogate pair, which is no character") from None
    return content
