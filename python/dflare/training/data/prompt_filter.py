"""Which prompts stay out of the data: what is measured later, and what is there already."""

import json
import re
from collections.abc import Iterable

from datasketch import MinHash, MinHashLSH

from dflare.training.data.prompts import Message

_RUN = 4  # words in a row that no prompt may share with an excluded one
_SHINGLE = 3  # words of the pieces whose share in common makes two prompts near-duplicates
_NEAR = 0.8
_PERMUTATIONS = 64


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: list[str], size: int) -> set[tuple[str, ...]]:
    """Return the runs of that many words; all words where there are fewer."""
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


class PromptFilter:
    """Admits a prompt once, if no excluded prompt shares its template or its words.

    A template that was filled with other words shares runs of words with what it was filled with
    before: so a run of four words in common with a user turn of an excluded prompt is enough.

    Args:
        excluded: Prompts that will be measured.
    """

    def __init__(self, excluded: Iterable[list[Message]] = ()) -> None:
        self._excluded = {
            run for prompt in excluded for turn in _turns(prompt) for run in _runs(turn, _RUN)
        }
        self._seen: set[str] = set()
        self._empty = MinHash(num_perm=_PERMUTATIONS)
        self._near = MinHashLSH(threshold=_NEAR, num_perm=_PERMUTATIONS)

    def allows(self, prompt: list[Message]) -> bool:
        """Whether no user turn shares a run of words with an excluded one."""
        return not any(self._excluded & _runs(turn, _RUN) for turn in _turns(prompt))

    def admit(self, prompt: list[Message]) -> bool:
        """Whether a prompt is allowed and new; one that is will not be new again.

        A near-duplicate has the same number of turns, and at least about 0.8 of all runs of three
        words in its first turn are in both.
        """
        if not self.allows(prompt):
            return False
        turns = _turns(prompt)
        exact = json.dumps(turns)
        if exact in self._seen:
            return False
        self._seen.add(exact)
        sketch = self._empty.copy()
        sketch.update_batch(
            [f"{len(turns)} {' '.join(run)}".encode() for run in _runs(turns[0], _SHINGLE)]
        )
        if self._near.query(sketch):
            return False
        self._near.insert(exact, sketch)
        return True


def _turns(prompt: list[Message]) -> list[list[str]]:
    """Return the words of each user turn."""
    return [_words(message["content"]) for message in prompt if message["role"] == "user"]
