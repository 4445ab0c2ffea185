"""Sets data generation up: tokenizer, target and the generator that is at hand."""

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from dflare.training.errors import ConfigError
from dflare.training.generate import Generator, Sampling
from dflare.training.prompts import Message, stop_tokens
from dflare.training.server_generator import ServerGenerator, own_server
from dflare.training.synth import AnswersPrompts, MakeGenerator, Synth, SynthSettings
from dflare.training.target import load_target, target_path

_ROWS_CPU, _ROWS_GPU = 16, 256


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
        ConfigError: An unknown generator, or SGLang where it is not installed.
    """
    has_gpu = torch.cuda.is_available()
    has_sglang = importlib.util.find_spec("sglang") is not None
    if generator == "auto":
        generator = "sglang" if has_sglang and has_gpu and device != "cpu" else "transformers"
    if generator not in ("sglang", "transformers"):
        raise ConfigError(f"--generator is {generator!r}, expected sglang, transformers or auto")
    if generator == "sglang" and server is None and not has_sglang:
        raise ConfigError(
            "--generator sglang needs SGLang: install it, name a --server, or use transformers"
        )
    path = target_path(target)
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = AutoConfig.from_pretrained(path).get_text_config()
    try:
        generation_config = GenerationConfig.from_pretrained(path)
    except OSError:
        generation_config = None  # the tokenizer's end token alone
    torch.manual_seed(settings.seed)

    def synth(make_generator: MakeGenerator) -> Synth:
        return Synth(
            output,
            tokenizer,
            make_generator,
            settings,
            target,
            config.vocab_size,
            stop_tokens(tokenizer, generation_config),
            excluded,
            deadline,
        )

    if server is not None or generator == "sglang":
        count = rows or _ROWS_GPU

        def over_http(url: str) -> MakeGenerator:
            def make(sampling: Sampling, length: int) -> AnswersPrompts:
                return ServerGenerator(url, count, length, sampling)

            return make

        if server is not None:
            yield synth(over_http(server))
        else:
            with own_server(path, ["--random-seed", str(settings.seed)]) as url:
                yield synth(over_http(url))
        return
    where = "cuda" if device == "cuda" or (device == "auto" and has_gpu) else "cpu"
    dtype = torch.bfloat16 if where == "cuda" else torch.float32
    model = load_target(path, (), where, dtype)
    count = rows or (_ROWS_GPU if where == "cuda" else _ROWS_CPU)

    def make(sampling: Sampling, length: int) -> AnswersPrompts:
        return Generator(model, count, length, sampling)

    yield synth(make)
