"""What commands show as tables."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dflare.checkpoint import Inspection

_STATUS_STYLES = {"ok": "green", "failed": "bold red", "note": "yellow"}


def show_inspection(inspection: "Inspection") -> None:
    """Print what `inspect_draft` found."""
    console = Console()
    console.print(_summary_table(inspection))
    if inspection.fusion:
        console.print(_fusion_table(inspection))
    console.print(_check_table(inspection))


def _summary_table(inspection: "Inspection") -> Table:
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


def _fusion_table(inspection: "Inspection") -> Table:
    table = Table(title="fusion: share of each tap", title_justify="left")
    table.add_column("layer", justify="right")
    for tap in inspection.config.target_layer_ids:
        table.add_column(str(tap), justify="right")
    table.add_column("dominant tap", justify="right")
    dominant = inspection.dominant_taps
    for layer, row in enumerate(inspection.fusion or []):
        table.add_row(str(layer), *(f"{share:.2f}" for share in row), str(dominant[layer]))
    return table


def _check_table(inspection: "Inspection") -> Table:
    table = Table(title="checks", show_header=False, title_justify="left")
    for check in inspection.checks:
        status = Text(check.status, style=_STATUS_STYLES[check.status])
        table.add_row(check.name, status, Text(check.detail))
    return table


def show_report(report: dict[str, Any]) -> None:
    """Print what `verify_pair` found as a table."""
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
