"""`dflare verify`: is it lossless, and what does it gain?"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dflare.cli.app import app


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
    from dflare.engine.launch import resolve_pair
    from dflare.engine.verify import VerifyOptions, verify_pair

    target_path, draft_path = resolve_pair(model, draft)
    report = verify_pair(
        VerifyOptions(target_path, draft_path, prompts, concurrency, max_new_tokens, temperature)
    )
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(report)
    if report["identical"] is not None and report["identical"] != report["prompts"]:
        raise typer.Exit(1)


def print_report(report: dict[str, Any]) -> None:
    """Print what `verify_pair` found as a table."""
    from rich.console import Console
    from rich.table import Table

    from dflare.adaptive.watch import ADVICE

    table = Table(title=f"{report['target']} + {report['draft']}", show_header=False)
    identical = report["identical"]
    rows = {
        "identical outputs": "not comparable at temperature > 0"
        if identical is None
        else f"{identical} of {report['prompts']}",
        "accept length": f"{report['accept_length']:.2f} tokens a verify step",
        "tokens/s without": f"{report['baseline_tok_s']:.1f}",
        "tokens/s with DFLARE": f"{report['dflare_tok_s']:.1f}",
        "speed-up": f"{report['speedup']:.2f}x at concurrency {report['concurrency']}",
        "device": report["device"],
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    if report["low_acceptance"]:
        Console().print(f"[bold]Hardly any draft is accepted.[/bold] {ADVICE}", highlight=False)
