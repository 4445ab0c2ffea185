"""The sub-commands. Each imports what it needs when it runs: `dflare --help` is quick."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dflare.cli.app import app, options_of
from dflare.training.data.settings import GenerationSettings


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model-path", "--model", help="Target: folder or hub id.")
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft", "--speculative-draft-model-path", help="DFlare drafter: folder or hub id."
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Serve SmolLM2-135M-Instruct and its drafter.")
    ] = False,
) -> None:
    """Serve a target with its DFlare drafter; every other flag goes to `sglang serve` as it is."""
    from dflare.apps.launch import resolve_pair, serve_pair

    target_path, draft_path = resolve_pair(model, draft, demo=demo)
    serve_pair(target_path, draft_path, context.args)


@app.command()
def demo(
    prompts: Annotated[int, typer.Option(help="Questions to ask, at most 20.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens an answer.")] = 64,
) -> None:
    """Serve the demo pair with and without DFLARE, chat over HTTP, and print a table."""
    from dflare.apps.demo_run import run_demo

    if not run_demo(prompts, max_tokens):
        raise typer.Exit(1)


@app.command()
def verify(
    model: Annotated[
        str | None, typer.Option("--model", help="Target; the demo's if neither is given.")
    ] = None,
    draft: Annotated[str | None, typer.Option("--draft", help="DFlare drafter.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSON Lines of {"messages": [...]} or {"prompt": "..."}.'),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens a prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file.")
    ] = None,
) -> None:
    """Run a pair with and without speculation; exit 1 if greedy outputs differ."""
    from dflare.apps.launch import resolve_pair
    from dflare.apps.verify import VerifyOptions, verify_pair
    from dflare.cli.tables import show_report

    target_path, draft_path = resolve_pair(model, draft)
    report = verify_pair(
        VerifyOptions(target_path, draft_path, prompts, concurrency, max_new_tokens, temperature)
    )
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show_report(report)
    if report["identical"] is not None and report["identical"] != report["prompts"]:
        raise typer.Exit(1)


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    load: Annotated[
        bool, typer.Option("--load", help="Load the plug-in into SGLang too (15 s).")
    ] = False,
) -> None:
    """Report versions, extension, plug-in and platform; exit 1 if something must be fixed."""
    from dflare.apps.diagnosis import diagnose

    report = diagnose(load=load)
    if json_output:
        typer.echo(json.dumps(report, indent=2))
    else:
        for name, value in report["facts"].items():
            typer.echo(f"{name:18} {value}")
        for problem in report["problems"]:
            typer.echo(f"problem            {problem}")
    if report["problems"]:
        raise typer.Exit(1)


@app.command("inspect")
def inspect_command(
    draft: Annotated[str, typer.Argument(help="Folder or Hugging Face id of the drafter.")],
    target: Annotated[
        str | None, typer.Option(help="Folder or Hugging Face id of the target to check it with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Validate a drafter, and that it fits a target; exit status 1 if anything is wrong."""
    from dflare.checkpoint import inspect_draft
    from dflare.checkpoint.problems import raise_problems
    from dflare.cli.tables import show_inspection

    inspection = inspect_draft(draft, target)
    if as_json:
        typer.echo(json.dumps(inspection.to_dict(), indent=2))
    else:
        show_inspection(inspection)
    raise_problems(draft, [f"{check.name}: {check.detail}" for check in inspection.failed])


@app.command("convert")
def convert_command(
    source: Annotated[str, typer.Argument(help="Folder or Hugging Face id of the drafter.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    block_size: Annotated[
        int | None,
        typer.Option(help="Tokens in a block, if the drafter's config.json does not say."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint that is there already.")
    ] = False,
) -> None:
    """Convert an AngelSpec or vLLM drafter to the AngelSlim dialect, which serving reads."""
    from dflare.checkpoint import convert, draft_sizes

    config = convert(source, destination, block_size=block_size, force=force)
    sizes = draft_sizes(config)
    typer.echo(
        f"{destination}: {config.num_hidden_layers} layers, {config.num_taps} taps, block "
        f"{config.block_size}, {sizes.parameters:,} parameters, {config.dtype}"
    )


@app.command("draft-vocab")
def draft_vocab_command(
    draft: Annotated[str, typer.Argument(help="Folder or Hugging Face id of the drafter.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    data: Annotated[
        list[Path], typer.Option(help="Answers of the target, as `dflare synth` writes them.")
    ],
    size: Annotated[int, typer.Option(help="Tokens that may be drafted.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint that is there already.")
    ] = False,
) -> None:
    """Write a copy of a drafter that drafts the most frequent tokens alone, which is faster."""
    from dflare.training.drafter.draft_vocabulary import write_draft_vocabulary

    share = write_draft_vocabulary(draft, destination, data, size, force=force)
    typer.echo(f"{destination}: drafts {size:,} tokens, {share:.2%} of what the answers hold")


@app.command("synth")
@options_of(GenerationSettings)
def synth(
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
    **generation: Any,
) -> None:
    """Generate training data; the same command goes on where an interrupted one stopped."""
    from dflare.training.data.synth_run import write_data

    write_data(
        output,
        target,
        prompts or [],
        GenerationSettings(**generation),
        templates=templates,
        templated=templated,
        self_written=self_written,
        exclude=exclude or [],
        openers=openers,
        rows=rows,
        generator=generator,
        server=server,
        device=device,
        max_minutes=max_minutes,
    )


@app.command("train")
def train_command(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, over the file's settings.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the snapshot in run.output.")
    ] = False,
) -> None:
    """Train a drafter and export it to OUTPUT/drafter.

    On several GPUs: torchrun --nproc-per-node 8 --no-python dflare train CONFIG.yaml
    """
    from dflare.training.run.config import load_config

    parsed = load_config(config, overrides)
    from dflare.training.run.loop import train
    from dflare.training.run.trainer import Trainer

    train(Trainer(parsed, resume=resume))


@app.command("swap")
def swap_command(
    url: Annotated[str, typer.Argument(help="Of a server that keeps its traffic.")],
    draft: Annotated[Path, typer.Argument(help="Folder of the new drafter.")],
    traffic: Annotated[Path, typer.Option(help="The server's DFLARE_TRAFFIC folder.")],
    watch_minutes: Annotated[
        float, typer.Option(help="How long to wait for what is served afterwards.")
    ] = 10.0,
    api_key: Annotated[str | None, typer.Option(help="The server's, if it has one.")] = None,
    admin_api_key: Annotated[str | None, typer.Option(help="The same.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, to compare drafters on.")] = "cpu",
) -> None:
    """Put a better drafter into a running server, and the old one back if it served better."""
    from dflare.training.run.swap import Server, swap

    swap(Server(url, api_key, admin_api_key), draft, traffic, watch_minutes, device)


@app.command("evaluate")
def evaluate_command(
    draft: Annotated[str, typer.Argument(help="Folder or Hugging Face id of the drafter.")],
    target: Annotated[str, typer.Option(help="Folder, Hugging Face id, or `demo`.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="Prompts: .txt, or JSONL with `prompt` or `messages`."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Training configuration whose held-out sequences give prompts."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of evaluation.json and .png.")] = Path("."),
    against: Annotated[
        str | None, typer.Option(help="Another drafter to compare with, on the same answers.")
    ] = None,
    check: Annotated[
        int, typer.Option(help="Decode this many prompts of each set as well; fail if it differs.")
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 for greedy.")] = 0.0,
    limit: Annotated[int | None, typer.Option(help="Prompts of each set; default all.")] = None,
    rows: Annotated[int, typer.Option(help="Prompts side by side.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    template_arguments: Annotated[
        str, typer.Option(help="JSON for the target's chat template, as for `dflare synth`.")
    ] = "{}",
) -> None:
    """Draft at every position of the target's answers; report accept lengths."""
    from dflare.training.run.evaluation_run import run_evaluation

    run_evaluation(
        draft,
        target,
        prompts or [],
        held_out,
        output,
        against=against,
        check=check,
        template=template_arguments,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        limit=limit,
        rows=rows,
        device=device,
    )
