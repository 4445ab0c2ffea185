"""Conversations while a target answers them, turn by turn."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from dflare.training.data.files import Record, prompt_key
from dflare.training.data.generate import Answer
from dflare.training.data.prompts import ASKING, Message, encode, key


class AnswersPrompts(Protocol):
    """A generator: ``Generator`` with transformers, or ``ServerGenerator``."""

    generated: int
    seconds: float

    def run(self, prompts: Iterable[list[int]], deadline: float | None = None) -> Iterator[Answer]:
        """Answer prompts in any order."""


@dataclass
class Conversation:
    """A conversation while it is answered.

    Args:
        prompt: What was given.
        template: Arguments of the chat template.
        ids: Tokens so far, ready for the answer.
        answers: Ranges of them that are answers.
        cut: The last answer was cut for its length.
    """

    prompt: list[Message]
    template: dict[str, Any] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    cut: bool = False
    _turns: list[Message] = field(default_factory=list)
    _taken: int = 0

    @property
    def key(self) -> int:
        """Identifies the prompt."""
        return prompt_key(key(self.prompt).encode())

    def ask(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> bool:
        """Go on to the next turn without an answer; whether there is one, with room for it."""
        while self._taken < len(self.prompt):
            self._turns.append(self.prompt[self._taken])
            self._taken += 1
            following = [turn["role"] for turn in self.prompt[self._taken : self._taken + 1]]
            # Results of several tools are answered together.
            if self._turns[-1]["role"] in ASKING and following not in (["assistant"], ["tool"]):
                ids = encode(tokenizer, self._turns, self.template)
                # What a server would be sent must go on from what the target said, token for
                # token; where a template or a tokenizer writes it differently, it ends here.
                if len(ids) >= max_length or ids[: len(self.ids)] != self.ids:
                    return False
                self.ids = ids
                return True
        return False

    def add(self, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take in the answer to the turn that was asked."""
        self.answers.append((len(self.ids), len(self.ids) + len(answer.ids)))
        self.ids = self.ids + answer.ids
        self.cut = answer.finish == "length"
        said = answer.ids if self.cut else answer.ids[:-1]
        self._turns.append({"role": "assistant", "content": str(tokenizer.decode(said))})

    def record(self) -> Record:
        """Return what is kept."""
        return Record(self.ids, self.answers, self.key, self.cut)


def converse(
    conversations: Iterable[Conversation],
    generator: AnswersPrompts,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    deadline: float | None = None,
) -> Iterator[Conversation]:
    """Let a target answer every turn of a user or tool that no answer follows, one after the other.

    Args:
        conversations: New ones; those whose first turn leaves no room are left out.
        generator: Answers.
        tokenizer: The target's.
        max_length: Tokens of a conversation.
        deadline: ``time.monotonic()`` at which to stop.

    Returns:
        Conversations, as they end.
    """
    open_turns = deque(c for c in conversations if c.ask(tokenizer, max_length))
    asked: list[Conversation] = []

    def prompts() -> Iterator[list[int]]:
        while open_turns:
            asked.append(open_turns.popleft())
            yield asked[-1].ids

    while open_turns and (deadline is None or time.monotonic() <= deadline):
        asked.clear()
        for answer in generator.run(prompts(), deadline):  # ends when no turn is open just then
            conversation = asked[answer.prompt]
            conversation.add(answer, tokenizer)
            if conversation.ask(tokenizer, max_length):
                open_turns.appendleft(conversation)
            else:
                yield conversation
