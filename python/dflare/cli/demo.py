"""`dflare demo`: a real server, real chat requests, and what speculation changes about them."""

from typing import Annotated

import typer

from dflare.cli.app import app


@app.command()
def demo(
    prompts: Annotated[int, typer.Option(help="Questions to ask, at most 20.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens an answer.")] = 64,
) -> None:
    """Serve the demo pair with and without DFLARE, chat over HTTP, and print a table."""
    from dflare.engine.demo_run import run_demo

    if not run_demo(prompts, max_tokens):
        raise typer.Exit(1)
