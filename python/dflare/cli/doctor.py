"""`dflare doctor`: what is installed, what is missing and how to fix it."""

from typing import Annotated

import typer

from dflare.cli.app import app


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    load: Annotated[
        bool, typer.Option("--load", help="Load the plug-in into SGLang too (15 s).")
    ] = False,
) -> None:
    """Report versions, extension, plug-in and platform; exit 1 if something must be fixed."""
    import json

    from dflare.engine.diagnosis import diagnose

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
