"""`dflare inspect`: validate a drafter, or a drafter and its target, and show what it is."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from dflare.cli.app import app

if TYPE_CHECKING:
    from rich.table import Table

    from dflare.checkpoint import Inspection

_STATUS_STYLES = {"ok": "green", "failed": "bold red", "note": "yellow"}


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

    inspection = inspect_draft(draft, target)
    if as_json:
        typer.echo(json.dumps(inspection.to_dict(), indent=2))
    else:
        _print_tables(inspection)
    raise_problems(draft, [f"{check.name}: {check.detail}" for check in inspection.failed])


def _print_tables(inspection: "Inspection") -> None:
    from rich.console import Console

    console = Console()
    console.print(_summary_table(inspection))
    if inspection.fusion:
        console.print(_fusion_table(inspection))
    console.print(_check_table(inspection))


def _summary_table(inspection: "Inspection") -> "Table":
    from rich.table import Table

    config, sizes = inspection.config, inspection.sizes
    windows = {config.window(layer) for layer in range(config.num_hidden_layers)}
    table = Table(title=str(inspection.folder), show_header=False, title_justify="left")
    rows = [
        ("dialect", config.dialect),
        ("draft layers (D)", str(config.num_hidden_layers)),
        ("taps (T)", f"{config.num_taps}: {', '.join(map(str, config.target_layer_ids))}"),
        ("target layers", str(config.num_target_layers)),
        ("block size (B)", str(config.block_size)),
        ("mask token", str(config.mask_token_id)),
        ("drafted tokens", f"{config.draft_vocab_size or config.vocab_size:,}"),
        ("hidden, MLP size", f"{config.hidden_size}, {config.intermediate_size}"),
        (
            "query, K/V heads",
            f"{config.num_attention_heads}, {config.num_key_value_heads} of {config.head_dim}",
        ),
        ("sliding window", "none" if windows == {-1} else f"{config.sliding_window} tokens"),
        ("dtype", config.dtype),
        ("parameters", f"{sizes.parameters:,}"),
        ("weights", f"{sizes.weight_bytes:,} bytes"),
        ("K/V a token, drafter", f"{sizes.kv_bytes_per_token:,} bytes"),
    ]
    if inspection.target_kv_bytes_per_token is not None:
        rows.append(("K/V a token, target", f"{inspection.target_kv_bytes_per_token:,} bytes"))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _fusion_table(inspection: "Inspection") -> "Table":
    from rich.table import Table

    table = Table(title="fusion: share of each tap", title_justify="left")
    table.add_column("layer", justify="right")
    for tap in inspection.config.target_layer_ids:
        table.add_column(str(tap), justify="right")
    table.add_column("dominant tap", justify="right")
    dominant = inspection.dominant_taps
    for layer, row in enumerate(inspection.fusion or []):
        table.add_row(str(layer), *(f"{share:.2f}" for share in row), str(dominant[layer]))
    return table


def _check_table(inspection: "Inspection") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title="checks", show_header=False, title_justify="left")
    for check in inspection.checks:
        status = Text(check.status, style=_STATUS_STYLES[check.status])
        table.add_row(check.name, status, Text(check.detail))
    return table
