"""A conversation while a target answers it, turn by turn."""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from dflare.training.data.files import Record, prompt_key
from dflare.training.data.generate import Answer
from dflare.training.data.prompts import Message, encode, key


@dataclass
class Conversation:
    """A conversation while it is answered.

    Args:
        prompt: What was given.
        ids: Tokens so far, ready for the answer.
        answers: Ranges of them that are answers.
        cut: The last answer was cut for its length.
    """

    prompt: list[Message]
    ids: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    cut: bool = False
    _turns: list[Message] = field(default_factory=list)
    _taken: int = 0

    @property
    def key(self) -> int:
        """Identifies the prompt."""
        return prompt_key(key(self.prompt))

    def ask(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> bool:
        """Go on to the next user turn without an answer; whether there is one, with room for it."""
        while self._taken < len(self.prompt):
            self._turns.append(self.prompt[self._taken])
            self._taken += 1
            following = self.prompt[self._taken : self._taken + 1]
            answered = following and following[0]["role"] == "assistant"
            if self._turns[-1]["role"] == "user" and not answered:
                ids = encode(tokenizer, self._turns)
                # What a server would be sent must go on from what the target said, token for
                # token; where a template or a tokenizer writes it differently, it ends here.
                if len(ids) >= max_length or ids[: len(self.ids)] != self.ids:
                    return False
                self.ids = ids
                return True
        return False

    def add(
        self, answer: Answer, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]
    ) -> None:
        """Take in the answer to the turn that was asked."""
        self.answers.append((len(self.ids), len(self.ids) + len(answer.ids)))
        self.ids = self.ids + answer.ids
        self.cut = answer.finish == "length"
        said = answer.ids[:-1] if answer.ids[-1] in stop_ids else answer.ids
        self._turns.append({"role": "assistant", "content": str(tokenizer.decode(said))})

    def record(self) -> Record:
        """Return what is kept."""
        return Record(self.ids, self.answers, self.key, self.cut)
