"""Plots of a sweep."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.serving.plan import Sweep

Record = dict[str, Any]
Key = tuple[str, int, str]  # dataset, concurrency, arm


def plot(sweep: Sweep, table: dict[Key, Record], dataset: str, path: Path) -> None:
    """Throughput and speed-up against concurrency, time per token against throughput."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def series(arm: str, value: Callable[[Record, int], float | None]) -> list[float | None]:
        return [
            value(table[dataset, c, arm], c) if (dataset, c, arm) in table else None
            for c in sweep.concurrency
        ]

    def speedup(figures: Record, concurrency: int) -> float | None:
        base = table.get((dataset, concurrency, sweep.baseline or ""))
        return figures["output_tok_s"] / base["output_tok_s"] if base else None

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    for arm in sweep.arms:
        style = {
            "linewidth": 2.5 if arm.kind == "adaptive" else 1.2,
            "marker": "o",
            "markersize": 4,
        }
        rate = series(arm.name, lambda figures, c: figures["output_tok_s"])
        if not any(rate):
            continue
        left.plot(sweep.concurrency, rate, label=arm.name, **style)
        middle.plot(sweep.concurrency, series(arm.name, speedup), **style)
        right.plot(rate, series(arm.name, lambda figures, c: figures["tpot_p50_ms"]), **style)
    for axes in (left, middle):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sweep.concurrency, [str(c) for c in sweep.concurrency])
        axes.set_xlabel("requests in flight")
    left.set_ylabel("output tokens/s")
    left.legend(fontsize=8)
    middle.set_ylabel("speed-up over no speculation")
    middle.axhline(1.0, color="grey", linewidth=0.8)
    right.set_xlabel("output tokens/s")
    right.set_ylabel("median time per output token, ms")
    title = f"{sweep.model}, {dataset}"
    if sweep.simulate_acc_len:
        title += f" (SIMULATED acceptance of {sweep.simulate_acc_len} tokens)"
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
