"""`dflare evaluate`: accept length of a drafter, for every width and tree."""

from pathlib import Path
from typing import Annotated

import typer

from dflare.cli.app import app


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
) -> None:
    """Draft at every position of the target's answers; report accept lengths."""
    from dflare.training.run.evaluate import run_evaluation

    run_evaluation(
        draft,
        target,
        prompts or [],
        held_out,
        output,
        against=against,
        check=check,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        limit=limit,
        rows=rows,
        device=device,
    )
