"""`dflare convert`: rewrite a drafter of another dialect so that it can be served."""

from pathlib import Path
from typing import Annotated

import typer

from dflare.cli.app import app


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
