"""`dflare draft-vocab`: let a drafter draft frequent tokens only."""

from pathlib import Path
from typing import Annotated

import typer

from dflare.cli.app import app


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
