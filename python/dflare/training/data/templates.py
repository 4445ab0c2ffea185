"""Prompts from templates: sentences with gaps, and lists of words and phrases to fill them."""

import importlib.resources
import random
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import inflect
import yaml
from pydantic import Field, ValidationError, field_validator

from dflare.text_file import read_text
from dflare.training.data.prompts import Message
from dflare.training.errors import ConfigError
from dflare.training.section import Section

_GAP = re.compile(r"\{(an? )?(\w+)(\.\w+)?\}")


class Words(Section):
    """A word list that a package carries, one word a line.

    Args:
        package: Name of the installed package.
        file: The list inside of it.
    """

    package: str
    file: str

    @cached_property
    def items(self) -> list[str]:
        """The words."""
        try:
            text = (importlib.resources.files(self.package) / self.file).read_text("utf-8")
        except (ModuleNotFoundError, OSError) as error:
            raise ConfigError(
                f"the word list {self.file} of the package {self.package} is not there ({error}); "
                f"run: pip install {self.package}"
            ) from error
        return [word.strip() for word in text.splitlines() if word.strip()]


class Numbers(Section):
    """Whole numbers from ``from`` to ``to``, both included."""

    start: int = Field(alias="from")
    end: int = Field(alias="to")

    @property
    def items(self) -> list[str]:
        """The numbers, written out."""
        return [str(number) for number in range(self.start, self.end + 1)]


class Templates(Section):
    """Templates of conversations.

    ``{noun}`` is an item of the list ``noun``, ``{a noun}`` one behind its article; ``{noun.x}`` is
    the same item wherever it stands in a prompt. Items may hold gaps themselves.

    Args:
        lists: What gaps are filled with, by name.
        templates: First turns of a user.
        follow_ups: Later ones; they fit whatever was said.
        turns: Shares of conversations with one, two, ... user turns.
    """

    lists: dict[str, list[str] | Words | Numbers] = Field(default={})
    templates: list[str] = Field(min_length=1)
    follow_ups: list[str] = Field(default=[])
    turns: list[float] = Field(default=[1.0], min_length=1)

    @field_validator("turns")
    @classmethod
    def _are_shares(cls, turns: list[float]) -> list[float]:
        if min(turns) < 0 or abs(sum(turns) - 1) > 1e-6:
            raise ValueError("turns are shares: not negative, and 1 together")
        return turns

    def conversations(self, seed: int) -> Iterator[list[Message]]:
        """Draw conversations without end: user turns alone, each to be answered in turn."""
        rng = random.Random(seed)
        lists = {
            name: words if isinstance(words, list) else words.items
            for name, words in self.lists.items()
        }
        article = inflect.engine().a
        while True:
            (count,) = rng.choices(range(len(self.turns)), self.turns)
            later = rng.sample(self.follow_ups, count)
            tagged: dict[str, str] = {}
            texts = [
                _fill(text, lists, rng, tagged, article)
                for text in (rng.choice(self.templates), *later)
            ]
            yield [{"role": "user", "content": text[0].upper() + text[1:]} for text in texts]


def _fill(text: str, lists: dict, rng: random.Random, tagged: dict, article) -> str:
    """Fill the gaps of a text, and those of what they are filled with."""

    def draw(gap: re.Match) -> str:
        indefinite, name, tag = gap.groups()
        item = tagged.get(f"{name}{tag}") if tag else None
        if item is None:
            if name not in lists:
                raise ConfigError(f"{gap[0]!r} in {text!r}: there is no list {name}")
            item = _fill(rng.choice(lists[name]), lists, rng, tagged, article)
            tagged[f"{name}{tag}"] = item
        return article(item) if indefinite else item

    return _GAP.sub(draw, text)


def read_templates(path: Path) -> Templates:
    """Read a YAML file of templates.

    Raises:
        ConfigError: It cannot be read, or is no such file.
    """
    try:
        return Templates.model_validate(yaml.safe_load(read_text(path, ConfigError)))
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from error
