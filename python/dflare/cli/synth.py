"""`dflare synth`: let a target write training data for its drafter."""

from pathlib import Path
from typing import Annotated

import typer

from dflare.cli.app import app


@app.command("synth")
def synth_command(
    output: Annotated[Path, typer.Argument(help="File to write, or to go on with.")],
    target: Annotated[str, typer.Option(help="Folder, Hugging Face id, or `demo`.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="Prompts to answer: .txt, or JSONL with `prompt`, `turns`, `messages`."),
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="YAML file of templates and word lists for prompts.")
    ] = None,
    templated: Annotated[
        int, typer.Option(help="Answer this many conversations drawn from --templates.")
    ] = 0,
    self_written: Annotated[
        int, typer.Option(help="Let the target write this many prompts itself.")
    ] = 0,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="Prompts that will be measured: none like them.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the answers; 0 for greedy.")] = 0.0,
    min_p: Annotated[float, typer.Option(help="Of the answers.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 512,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and answer.")] = 2048,
    prompt_temperature: Annotated[float, typer.Option(help="Of self-written prompts.")] = 1.0,
    prompt_min_p: Annotated[float, typer.Option(help="Of self-written prompts.")] = 0.02,
    openers: Annotated[
        Path | None,
        typer.Option(help="Text file: beginnings of self-written prompts, one a line."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Sequences side by side; default 16 on a CPU, 256 on a GPU.")
    ] = None,
    generator: Annotated[
        str, typer.Option(help="sglang, transformers, or auto: SGLang where it is installed (GPU).")
    ] = "auto",
    server: Annotated[str | None, typer.Option(help="URL of a running SGLang server.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto (transformers).")] = "auto",
    max_minutes: Annotated[float | None, typer.Option(help="Stop in time.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Generate training data; the same command goes on where an interrupted one stopped."""
    from dflare.training.data.prompts import read_openers, read_prompts
    from dflare.training.data.synth import SynthSettings, minutes_from_now
    from dflare.training.data.synth_run import open_synth
    from dflare.training.data.templates import read_templates
    from dflare.training.errors import ConfigError

    if not prompts and not self_written and not templated:
        raise ConfigError(
            "nothing to answer: give --prompts FILE, --self-written N or --templated N"
        )
    if templated and templates is None:
        raise ConfigError("--templated needs --templates FILE, such as configs/demo/templates.yaml")
    settings = SynthSettings(
        temperature=temperature,
        min_p=min_p,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        prompt_temperature=prompt_temperature,
        prompt_min_p=prompt_min_p,
        openers=read_openers(openers) if openers else ("",),
        seed=seed,
    )
    excluded = [messages for file in exclude or [] for messages in read_prompts(file)]
    given = [messages for file in prompts or [] for messages in read_prompts(file)]
    with open_synth(
        output,
        target,
        settings,
        excluded,
        minutes_from_now(max_minutes),
        generator=generator,
        server=server,
        rows=rows,
        device=device,
    ) as synth:
        written = synth.write_prompts(self_written) if self_written else []
        if templates is not None:
            written += synth.choose(read_templates(templates).conversations(seed), templated)
        synth.answer(given + written)
