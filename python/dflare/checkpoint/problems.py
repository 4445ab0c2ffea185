"""One way to say what is wrong with a checkpoint: every problem at once, one line each."""

from collections.abc import Sequence
from pathlib import Path

from dflare.errors import CheckpointError


def raise_problems(source: str | Path, problems: Sequence[str]) -> None:
    """Raise if anything is wrong, naming everything that is.

    Args:
        source: File or folder that the problems are about.
        problems: Sentences without the source's name; none means that all is well.

    Raises:
        CheckpointError: One line for one problem, else a list under a headline.
    """
    if len(problems) == 1:
        raise CheckpointError(f"{source}: {problems[0]}")
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise CheckpointError(f"{source}: {len(problems)} problems{lines}")


def name_some(names: Sequence[str], limit: int = 20) -> str:
    """Join names for a message, with a count in place of those beyond `limit`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
