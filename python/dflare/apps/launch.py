"""Starting SGLang with a pair: from the command line and for `dflare verify`."""

import argparse
import socket
from pathlib import Path

from dflare.adaptive import AdaptiveConfig
from dflare.checkpoint import check_finite, check_pair, read_config
from dflare.engine.names import ALGORITHM
from dflare.engine.traffic import traffic_folder
from dflare.engine.version import check_sglang_version
from dflare.errors import CheckpointError, DFlareError
from dflare.text_file import parse_json_line, read_text_lines

# Chat questions of `make demo` and of `dflare verify` without --prompts; kept out of training data.
QUESTIONS_FILE = "questions.jsonl"


def resolve_pair(model: str | None, draft: str | None, *, demo: bool = False) -> tuple[str, str]:
    """Settle which pair is meant: the one named, or the demo pair.

    Args:
        model, draft: folder or hub id of target and drafter; None for the demo pair's.
        demo: whether the demo pair was asked for.

    Returns:
        Paths of target and drafter.

    Raises:
        CheckpointError: only one of the two was named, or the demo pair and another at once.
    """
    if demo or (model is None and draft is None):
        if model is not None or draft is not None:
            raise CheckpointError(
                "--demo serves its own pair; leave out --demo, or --model-path and --draft"
            )
        from dflare.demo import demo_draft, demo_target

        return str(demo_target()), str(demo_draft())
    if model is None or draft is None:
        given, missing = (
            ("--draft", "--model-path") if model is None else ("--model-path", "--draft")
        )
        raise CheckpointError(f"{given} needs {missing} beside it; a drafter fits one target only")
    return model, draft


def check_before_start(target: str, draft: str) -> None:
    """Find what is wrong with a pair in a second, before SGLang's slow start.

    Raises:
        DFlareError: the first thing that is wrong, in one line.
    """
    check_sglang_version()
    config = read_config(draft)
    AdaptiveConfig.from_environment(config.block_size)
    traffic_folder()
    check_finite(draft, config)
    folder = Path(target)
    if folder.exists():
        check_pair(config, folder, draft)


def serve_pair(target: str, draft: str, sglang_args: list[str]) -> None:
    """Run SGLang's HTTP server in this process until it ends.

    Args:
        target, draft: paths of the pair.
        sglang_args: further arguments, as `sglang serve` takes them.

    Raises:
        DFlareError: the pair or the arguments are wrong.
    """
    _check_port(sglang_args)
    check_before_start(target, draft)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    argv = ["--model-path", target, *pair_args(draft), *sglang_args]
    import os

    try:
        run_server(prepare_server_args(argv))
    except ValueError as error:
        raise DFlareError(str(error).removeprefix(f"{ALGORITHM}: ")) from error
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _check_port(sglang_args: list[str]) -> None:
    """Refuse an address that is taken: SGLang would notice after loading everything, and hang.

    Raises:
        DFlareError: nothing can listen there.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    try:
        given, _ = parser.parse_known_args(sglang_args)
    except argparse.ArgumentError:
        return  # SGLang's own parser says what is wrong with it
    try:
        with socket.create_server(
            (given.host, given.port), family=_family(given.host, given.port), backlog=1
        ):
            pass
    except (OSError, OverflowError) as error:
        raise DFlareError(
            f"cannot listen on {given.host} port {given.port} ({error}); choose another with "
            "--port, or end the program that has it"
        ) from error


def _family(host: str, port: int) -> socket.AddressFamily:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]


def pair_args(draft: str) -> list[str]:
    """SGLang's flags that turn DFLARE on."""
    return ["--speculative-algorithm", ALGORITHM, "--speculative-draft-model-path", draft]


def read_prompts(file: Path, tokenizer) -> list[list[int]]:
    """Token ids of the prompts in a JSON Lines file.

    Args:
        file: one object a line, `{"messages": [...]}` (chat, templated with a generation prompt),
            `{"question": "..."}` or `{"problem": "..."}` (one user turn, as GSM8K and MATH-500
            have it), or `{"prompt": "..."}` (plain text, as HumanEval has it).
        tokenizer: the target's, with a chat template if there are messages.

    Raises:
        DFlareError: naming the file, the line and what is wrong with it.
    """
    prompts = []
    for number, line in read_text_lines(file, DFlareError):
        if line.strip():
            prompts.append(_prompt_ids(f"{file}, line {number}", line, tokenizer))
    if not prompts:
        raise DFlareError(f"{file}: holds no prompt, expected one JSON object a line")
    return prompts


def _prompt_ids(where: str, line: str, tokenizer) -> list[int]:
    expected = 'expected {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": "..."}'
    try:
        entry = parse_json_line(line)
    except ValueError as error:
        raise DFlareError(f"{where}: not JSON ({error}); {expected}") from error
    for key in ("question", "problem"):
        if isinstance(entry, dict) and isinstance(entry.get(key), str):
            entry = {"messages": [{"role": "user", "content": entry[key]}]}
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
        ids = tokenizer(entry["prompt"])["input_ids"]
    elif isinstance(entry, dict) and isinstance(entry.get("messages"), list):
        try:
            ids = tokenizer.apply_chat_template(
                entry["messages"], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        except Exception as error:  # the template is a program of the checkpoint's
            raise DFlareError(
                f"{where}: the chat template refuses it ({error}); {expected}"
            ) from error
    else:
        raise DFlareError(f"{where}: got {line.strip()[:80]!r}; {expected}")
    if not ids:
        raise DFlareError(f"{where}: an empty prompt; give at least one token")
    return list(ids)
