"""Training data from a target: it answers prompts, and writes the prompts if there are none."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from dflare.training.data.conversation import AnswersPrompts, Conversation, converse
from dflare.training.data.files import DataFile
from dflare.training.data.generate import Answer, Sampling
from dflare.training.data.prompt_filter import PromptFilter
from dflare.training.data.prompts import Message, read_lines, template_arguments
from dflare.training.data.settings import SynthSettings
from dflare.training.errors import ConfigError, DataError

_USELESS = 2000  # user turns in a row that make no prompt, after which to give up
_MARK = "\u2980user turn\u2980"  # stands for a user turn in a chat template; no template holds it


MakeGenerator = Callable[[Sampling, int], AnswersPrompts]
"""Makes a generator for a way of sampling and a length of prompt and answer together."""


def prompts_file(path: Path) -> Path:
    """Where the prompts that the target writes for a data file are kept."""
    return path.with_suffix(".prompts.jsonl")


class JsonLines:
    """Prompts that a target wrote: JSONL that grows, and is continued where it was left.

    Args:
        path: The file.
        header: Its first line; a file that is there already must have the same.

    Raises:
        ConfigError: The file was made with other settings.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.records: list[dict[str, Any]] = []
        if path.exists() and path.stat().st_size:
            lines = [record for _, record in read_lines(path)]
            if not lines or lines[0] != header:
                old = lines[0] if lines else {}
                raise ConfigError(
                    f"{path}: was made with other settings ({old}); these are {header}. Name "
                    "another file, or give the settings it was made with to go on"
                )
            self.records = lines[1:]
            self._cut_partial_line(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        self._path = path
        self._file: IO[str] = path.open("a", encoding="utf-8")

    @staticmethod
    def _cut_partial_line(path: Path) -> None:
        """Remove what an interruption left of a last line."""
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)

    def add(self, record: dict[str, Any]) -> None:
        """Append a line, at once: what was generated survives whatever happens."""
        try:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"{self._path}: cannot be written ({error}); make room and give the same command "
                "again, it goes on with what is there"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Synth:
    """Writes a data file.

    Args:
        path: The file; the prompts that the target writes go beside it.
        tokenizer: The target's.
        make_generator: Makes the generator.
        settings: How to generate.
        made_by: Generator and dtype, noted in the file beside the settings.
        target_name: Noted in the file.
        vocab_size: The target's, noted in the file.
        stop_ids: Tokens that end an answer.
        excluded: Prompts that will be measured: no others with four words in a row of theirs.
        deadline: ``time.monotonic()`` at which to stop; none to go on to the end.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        make_generator: MakeGenerator,
        settings: SynthSettings,
        made_by: dict[str, str],
        target_name: str,
        vocab_size: int,
        stop_ids: tuple[int, ...],
        excluded: Iterable[list[Message]] = (),
        deadline: float | None = None,
    ) -> None:
        self._path, self._tokenizer, self._make_generator = path, tokenizer, make_generator
        self._settings, self._stop_ids, self.deadline = settings, stop_ids, deadline
        self._filter = PromptFilter(excluded)
        self._template = template_arguments(settings.template_arguments)
        self._header = {
            "target": target_name,
            "vocab_size": vocab_size,
            "generation": settings.model_dump(mode="json") | made_by,
        }
        self._console = Console(stderr=True)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            console=self._console,
        )

    def write_prompts(self, count: int) -> list[list[Message]]:
        """Let the target write user turns after its own chat template.

        Args:
            count: Different prompts wanted; those of an earlier call are counted.

        Returns:
            The prompts, from ``<file>.prompts.jsonl``.

        Raises:
            DataError: The target has no chat template, or writes nothing new that is usable.
        """
        generator, starts = self._user_turns()
        openers = self._settings.openers
        file = JsonLines(prompts_file(self._path), self._header)
        prompts = [[{"role": "user", "content": r["prompt"]}] for r in file.records]
        for messages in prompts:
            self._filter.admit(messages)

        def endless() -> Iterator[list[int]]:
            while len(prompts) < count:
                yield from starts

        useless = 0
        with self._progress() as progress:
            task = progress.add_task("prompts", total=count, completed=len(prompts), rate="")
            for answer in generator.run(endless(), self.deadline):
                text = self._user_text(openers[answer.prompt % len(starts)], answer)
                messages = [{"role": "user", "content": text}]
                if not text or not self._filter.admit(messages):
                    useless += 1
                    if useless > _USELESS:
                        raise DataError(
                            f"the target's last {_USELESS} user turns were all cut, empty or "
                            f"known; {len(prompts)} are kept. Give --prompts, or raise "
                            "--prompt-temperature"
                        )
                    continue
                if len(prompts) >= count:
                    break
                useless = 0
                prompts.append(messages)
                file.add({"prompt": text})
                progress.update(task, completed=len(prompts), rate=_rate(generator))
        file.close()
        return prompts

    def _user_turns(self) -> tuple[AnswersPrompts, list[list[int]]]:
        """A generator that goes on with user turns, and what one begins with for each opener."""
        before, after = self._template_around_a_turn()
        settings = self._settings
        ends = self._tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        sampling = Sampling(
            settings.prompt_temperature,
            settings.prompt_min_p,
            settings.prompt_max_tokens,
            tuple({*ends, *self._stop_ids}),
        )
        starts = [
            self._tokenizer(before + opener, add_special_tokens=False)["input_ids"]
            for opener in settings.openers
        ]
        longest = max(len(ids) for ids in starts)
        return self._make_generator(sampling, longest + settings.prompt_max_tokens), starts

    def _user_text(self, opener: str, answer: Answer) -> str:
        """The user turn that the target wrote; empty if it was cut, or is no more than a sign."""
        ids = answer.ids[:-1]
        if answer.finish == "length" or set(ids) & set(self._tokenizer.all_special_ids):
            return ""
        text = (opener + str(self._tokenizer.decode(ids))).strip()
        return text if len(text) >= 4 else ""

    def _template_around_a_turn(self) -> tuple[str, str]:
        """Return what a chat template puts before and behind a user turn."""
        if not self._tokenizer.chat_template:
            raise DataError(
                "the target's tokenizer has no chat template to write user turns with; "
                "give prompts with --prompts"
            )
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}],
            tokenize=False,
            add_generation_prompt=True,
            **self._template,
        )
        before, mark, after = str(text).partition(_MARK)
        if not mark:
            raise DataError(
                "the target's chat template changes the user turn; give prompts with --prompts"
            )
        return before, after

    def choose(self, prompts: Iterable[list[Message]], count: int) -> list[list[Message]]:
        """Take prompts from an endless source: allowed ones, without near-duplicates.

        Args:
            prompts: Where they come from, see :meth:`Templates.conversations`.
            count: How many.

        Raises:
            DataError: The source gives nothing new any more.
        """
        chosen: list[list[Message]] = []
        useless = 0
        for prompt in prompts:
            if len(chosen) >= count:
                break
            admitted = self._filter.admit(prompt)
            useless = 0 if admitted else useless + 1
            if admitted:
                chosen.append(prompt)
            elif useless > _USELESS:
                raise DataError(
                    f"the last {_USELESS} prompts were all excluded or much like earlier ones; "
                    f"{len(chosen)} are new. Ask for no more, or write more templates"
                )
        return chosen

    def answer(self, prompts: Iterable[list[Message]]) -> int:
        """Let the target answer prompts; those answered by an earlier call are skipped.

        A user turn that no answer follows is answered, the one before the next is asked: so a
        conversation of user turns alone becomes one of several turns.

        Args:
            prompts: Conversations that end with a user turn.

        Returns:
            Conversations in the file.
        """
        settings = self._settings
        file = DataFile(self._path, self._header)
        written = len(file.keys)
        open_turns: list[Conversation] = []
        known = set(file.keys)
        for messages in prompts:
            conversation = Conversation(messages, self._template)
            if conversation.key in known or not self._filter.allows(messages):
                continue
            known.add(conversation.key)
            open_turns.append(conversation)
        sampling = Sampling(
            settings.temperature, settings.min_p, settings.max_new_tokens, self._stop_ids
        )
        generator = self._make_generator(sampling, settings.max_length)
        total = written + len(open_turns)
        try:
            with self._progress() as progress:
                task = progress.add_task("answers", total=total, completed=written, rate="")
                for conversation in converse(
                    open_turns, generator, self._tokenizer, settings.max_length, self.deadline
                ):
                    file.add(conversation.record())
                    written += 1
                    progress.update(task, completed=written, rate=_rate(generator))
        finally:
            file.close()
        self._console.print(
            f"{self._path}: {written} conversations; {generator.generated} tokens in this call, "
            f"{_rate(generator)}",
            highlight=False,
        )
        return written


def _rate(generator: AnswersPrompts) -> str:
    return f"{generator.generated / max(generator.seconds, 1e-9):.0f} tokens/s"


def minutes_from_now(minutes: float | None) -> float | None:
    """Turn a time budget into a deadline."""
    return None if minutes is None else time.monotonic() + 60.0 * minutes
