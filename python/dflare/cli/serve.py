"""`dflare serve`: SGLang's server with DFLARE on, and the demo pair at a word."""

from typing import Annotated

import typer

from dflare.cli.app import app

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=PASS_THROUGH)
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
    from dflare.engine.launch import resolve_pair, serve_pair

    target_path, draft_path = resolve_pair(model, draft, demo=demo)
    serve_pair(target_path, draft_path, context.args)
