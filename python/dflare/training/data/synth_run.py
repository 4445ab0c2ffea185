"""Sets data generation up: tokenizer, target and the generator that is at hand."""

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from dflare.checkpoint import read_target_config
from dflare.training.data.conversation import AnswersPrompts
from dflare.training.data.generate import Generator, Sampling
from dflare.training.data.prompts import Message, read_openers, read_prompts, stop_tokens
from dflare.training.data.server_generator import ServerGenerator, own_server, server_info
from dflare.training.data.settings import GenerationSettings, SynthSettings
from dflare.training.data.synth import MakeGenerator, Synth, minutes_from_now, prompts_file
from dflare.training.data.target import (
    choose_device,
    compute_dtype,
    load_target,
    load_tokenizer,
    target_path,
)
from dflare.training.data.templates import read_templates
from dflare.training.errors import ConfigError

_ROWS_CPU, _ROWS_GPU = 16, 256


def write_data(
    output: Path,
    target: str,
    prompts: list[Path],
    generation: GenerationSettings,
    *,
    templates: Path | None,
    templated: int,
    self_written: int,
    exclude: list[Path],
    openers: Path | None,
    rows: int | None,
    generator: str,
    server: str | None,
    device: str,
    max_minutes: float | None,
) -> None:
    """Do what `dflare synth` is asked for; its help describes the arguments.

    Raises:
        ConfigError: Nothing to answer, or settings that make no sense.
        DFlareError: A file, a target or a server that cannot be used.
    """
    if not prompts and not self_written and not templated:
        raise ConfigError(
            "nothing to answer: give --prompts FILE, --self-written N or --templated N"
        )
    if templated and templates is None:
        raise ConfigError("--templated needs --templates FILE, such as configs/demo/templates.yaml")
    given = read_openers(openers) if openers else ("",)
    settings = SynthSettings(**generation.model_dump(), openers=given)
    excluded = [messages for file in exclude for messages in read_prompts(file)]
    asked = [messages for file in prompts for messages in read_prompts(file)]
    deadline = minutes_from_now(max_minutes)
    place: dict[str, Any] = {
        "generator": generator,
        "server": server,
        "rows": rows,
        "device": device,
    }
    with open_synth(output, target, settings, excluded, deadline, **place) as synth:
        written = synth.write_prompts(self_written) if self_written else []
        if templates is not None:
            drawn = read_templates(templates).conversations(generation.seed)
            written += synth.choose(drawn, templated)
        synth.answer(asked + written)


def _kind_of_generator(generator: str, server: str | None, device: str) -> str:
    """`sglang` or `transformers`, as is asked for or else as is at hand."""
    has_sglang = importlib.util.find_spec("sglang") is not None
    if generator not in ("sglang", "transformers", "auto"):
        raise ConfigError(f"--generator is {generator!r}, expected sglang, transformers or auto")
    if server is not None:
        return "sglang"
    if generator == "auto":
        fast = has_sglang and choose_device(device) == "cuda"
        return "sglang" if fast else "transformers"
    if generator == "sglang" and not has_sglang:
        raise ConfigError(
            "--generator sglang needs SGLang: install it, name a --server, or use transformers"
        )
    return generator


@contextmanager
def open_synth(
    output: Path,
    target: str,
    settings: SynthSettings,
    excluded: Iterable[list[Message]],
    deadline: float | None,
    *,
    generator: str = "auto",
    server: str | None = None,
    rows: int | None = None,
    device: str = "auto",
) -> Iterator[Synth]:
    """Prepare to write a data file; a server of our own runs until the block is left.

    Args:
        output: Data file.
        target: Folder, hub id or ``demo``.
        settings: How to generate.
        excluded: Prompts that must not be in the data.
        deadline: ``time.monotonic()`` at which to stop.
        generator: ``sglang``, ``transformers`` or ``auto``.
        server: URL of a running server, which is used then.
        rows: Sequences side by side.
        device: For transformers: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        ConfigError: An unknown generator or device, or SGLang where it is not installed.
        DFlareError: A target or a server that cannot be used.
    """
    kind = _kind_of_generator(generator, server, device)
    path = target_path(target)
    config = read_target_config(path).get_text_config()
    tokenizer = load_tokenizer(path)
    # A call that goes on must not draw again what the calls before it drew.
    files = [file for file in (output, prompts_file(output)) if file.exists()]
    seed = settings.seed + sum(file.stat().st_size for file in files)
    torch.manual_seed(seed)
    source: AbstractContextManager[tuple[MakeGenerator, str]]
    if kind == "sglang":
        log = output.with_suffix(".server.log")
        own_dtype = str(getattr(config, "dtype", None) or "auto").removeprefix("torch.")
        source = _over_http(path, server, rows or _ROWS_GPU, seed, log, own_dtype)
    else:
        source = nullcontext(_with_transformers(path, rows, device))
    with source as (make_generator, dtype):
        yield Synth(
            output,
            tokenizer,
            make_generator,
            settings,
            {"generator": kind, "dtype": dtype},
            target,
            config.vocab_size,
            stop_tokens(tokenizer, _generation_config(path)),
            excluded,
            deadline,
        )


def _generation_config(path: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return None  # the tokenizer's end token alone


@contextmanager
def _over_http(
    path: str, server: str | None, rows: int, seed: int, log: Path, own_dtype: str
) -> Iterator[tuple[MakeGenerator, str]]:
    """Generators that ask a server, or one of our own, and the dtype that it computes in."""
    log.parent.mkdir(parents=True, exist_ok=True)
    flags = ["--random-seed", str(seed)]
    with nullcontext(server) if server else own_server(path, flags, log) as url:

        def make(sampling: Sampling, length: int) -> AnswersPrompts:
            return ServerGenerator(url, rows, length, sampling)

        dtype = str(server_info(url)["dtype"])
        yield make, own_dtype if dtype == "auto" else dtype


def _with_transformers(path: str, rows: int | None, device: str) -> tuple[MakeGenerator, str]:
    """Generators in this process, and the dtype that they compute in."""
    where = choose_device(device)
    dtype = compute_dtype(torch.device(where))
    model = load_target(path, (), where, dtype)
    count = rows or (_ROWS_GPU if where == "cuda" else _ROWS_CPU)

    def make(sampling: Sampling, length: int) -> AnswersPrompts:
        return Generator(model, count, length, sampling)

    return make, str(dtype).removeprefix("torch.")
