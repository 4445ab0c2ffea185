"""Prompts from files, as messages and as token ids."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dflare.text_file import parse_json_line, read_text, read_text_lines
from dflare.training.errors import ConfigError, DataError

Message = dict[str, Any]  # "role", "content", and whatever else a chat template reads
ASKING = ("user", "tool")  # roles whose turns are answered
_TURNS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_TURNS |= {"system": "system", "tool": "tool"}


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Parse JSONL, with line numbers from 1; a last line that was cut short is left out.

    Raises:
        DataError: The file is missing, or a line other than the last is not a JSON object.
    """
    broken = None
    for number, line in read_text_lines(path, DataError):
        if broken is not None:
            raise DataError(f"{path}:{broken}: not a JSON object; mend or remove the line")
        try:
            content = parse_json_line(line)
        except json.JSONDecodeError:
            broken = number
            continue
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}; mend or remove the line") from error
        if not isinstance(content, dict):
            raise DataError(f"{path}:{number}: not a JSON object; mend or remove the line")
        yield number, content


def _messages(record: dict[str, Any], where: str) -> list[Message]:
    for key in ("prompt", "question", "problem", "instruction", "text"):
        if isinstance(record.get(key), str):
            return [{"role": "user", "content": record[key]}]
    if isinstance(own := record.get("turns"), list) and all(isinstance(t, str) for t in own):
        record = {"messages": [{"role": "user", "content": text} for text in own]}
    turns = record.get("messages", record.get("conversations"))
    try:
        if not isinstance(turns, list):
            raise KeyError("messages")
        messages = [_message(turn) for turn in turns]
    except (KeyError, TypeError) as error:
        raise DataError(
            f'{where}: expected "prompt" (a string), "turns" (a list of strings) or "messages" (a '
            f"list of role and content), got keys {sorted(record)}"
        ) from error
    # What the target would answer is what training wants; answers of others are dropped.
    while messages and messages[-1]["role"] not in ASKING:
        messages.pop()
    if not messages:
        raise DataError(f"{where}: no user turn to answer; add one or remove the line")
    return messages


def _message(turn: dict[str, Any]) -> Message:
    """One turn; a call of tools may have no content."""
    if "from" in turn:
        return {"role": _TURNS[turn["from"]], "content": turn["value"]}
    content = turn.get("content") or "" if turn.get("tool_calls") else turn["content"]
    return {**turn, "role": _TURNS[turn["role"]], "content": content}


def read_prompts(path: Path) -> list[list[Message]]:
    """Read prompts, one a line.

    Args:
        path: ``.txt`` with one user turn a line, or JSONL with ``prompt`` or ``messages``
            (ShareGPT's ``conversations`` too); the last answer, if there is one, is dropped. A line
            with ``turns`` holds several user turns, each of which is to be answered. Messages may
            be those of tools, and hold what the target's chat template reads, such as
            ``tool_calls`` and ``reasoning_content``.

    Raises:
        DataError: The file or a line cannot be understood, or there is no prompt.
    """
    if path.suffix == ".txt":
        lines = read_text(path, DataError).splitlines()
        prompts = [[{"role": "user", "content": line.strip()}] for line in lines if line.strip()]
    else:
        prompts = [_messages(record, f"{path}:{number}") for number, record in read_lines(path)]
    if not prompts:
        raise DataError(f"{path}: holds no prompts")
    return prompts


def read_openers(path: Path) -> tuple[str, ...]:
    """Read beginnings of user turns, one a line; an empty line is a free beginning.

    Raises:
        DataError: The file cannot be read or is empty.
    """
    lines = read_text(path, DataError).splitlines()
    if not lines:
        raise DataError(f"{path}: holds no openers")
    return tuple(lines)


def template_arguments(text: str) -> dict[str, Any]:
    """Read what a chat template is told, JSON such as ``{"enable_thinking": false}``.

    Raises:
        ConfigError: It is no JSON object.
    """
    try:
        arguments = parse_json_line(text)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ConfigError(
            f"template arguments are {text!r}, expected a JSON object such as "
            '{"enable_thinking": false}'
        )
    return arguments


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> list[int]:
    """Turn messages into token ids, up to where the answer begins.

    With a chat template it is what a server makes of a chat request; a base model gets the last
    turn as plain text.

    Args:
        tokenizer: The target's.
        messages: Turns so far.
        arguments: For the template, as a request's ``chat_template_kwargs``, and ``tools``.

    Raises:
        DataError: The template refuses the messages.
    """
    if not tokenizer.chat_template:
        return tokenizer(messages[-1]["content"])["input_ids"]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **arguments
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"the target's chat template refuses {json.dumps(messages)[:200]} with "
            f"{dict(arguments)} ({error}); mend the messages or --template-arguments"
        ) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def key(messages: list[Message]) -> str:
    """Return what makes prompts the same: turns and words, not case or spacing."""
    turns = []
    for message in messages:
        more = {k: v for k, v in message.items() if k not in ("role", "content")}
        words = " ".join(message["content"].lower().split())
        turns.append([message["role"], words, *([more] if more else [])])
    return json.dumps(turns)


def stop_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer: the tokenizer's and the generation config's."""
    ends = getattr(generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return tuple(sorted(token for token in ids if token is not None))
