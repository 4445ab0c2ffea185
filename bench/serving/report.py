"""Tables, plots and the verdict of a sweep."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from plan import Sweep

Record = dict[str, Any]
Key = tuple[str, int, str]  # dataset, concurrency, arm


def medians(records: Iterable[Record]) -> dict[Key, Record]:
    """Per dataset, concurrency and arm the median of every figure over the repeats.

    Errors are summed; `wrong` counts answers that differ from the `none` arm's in the same cell.
    """
    runs: dict[Key, list[Record]] = defaultdict(list)
    for record in records:
        runs[record["dataset"], record["concurrency"], record["arm"]].append(record)
    result = {}
    for key, group in runs.items():
        figures = {
            name: median(values)
            for name in group[0]
            if name not in ("errors", "repeat", "concurrency")
            and (values := [r[name] for r in group if isinstance(r[name], int | float)])
        }
        result[key] = figures | {"errors": sum(r["errors"] for r in group), "repeats": len(group)}
    return result


def count_differences(sweep: Sweep, records: Iterable[Record]) -> dict[str, tuple[int, int]]:
    """Per arm, how many answers differ from those without speculation, and of how many."""
    baseline = next((arm.name for arm in sweep.arms if arm.kind == "none"), None)
    records = list(records)
    reference = {
        (r["dataset"], r["concurrency"], r["repeat"]): r["outputs"]
        for r in records
        if r["arm"] == baseline
    }
    counts: dict[str, tuple[int, int]] = {}
    for record in records:
        expected = reference.get((record["dataset"], record["concurrency"], record["repeat"]))
        if expected and record["arm"] != baseline:
            wrong, total = counts.get(record["arm"], (0, 0))
            pairs = list(zip(expected, record["outputs"], strict=True))
            counts[record["arm"]] = (wrong + sum(a != b for a, b in pairs), total + len(pairs))
    return counts


def adaptive_ratios(sweep: Sweep, records: Iterable[Record]) -> dict[Key, float]:
    """Throughput of the adaptive arm over that of each arm that it must not lose to.

    Every repeat has its own prompts, and a shared machine drifts: so the ratio is taken within a
    repeat, where the arms were measured minutes apart on the same prompts, and the median over
    the repeats comes after.

    Returns:
        For (dataset, concurrency, arm) of all arms of kind `none` and `fixed` measured so far.
    """
    rates = {
        (r["dataset"], r["concurrency"], r["repeat"], r["arm"]): r["output_tok_s"] for r in records
    }
    adaptive = {arm.name for arm in sweep.arms if arm.kind == "adaptive"}
    rivals = {arm.name for arm in sweep.arms if arm.kind in ("none", "fixed")}
    ratios: dict[Key, list[float]] = defaultdict(list)
    for (dataset, concurrency, repeat, arm), rate in rates.items():
        for other in rivals if arm in adaptive else ():
            if base := rates.get((dataset, concurrency, repeat, other)):
                ratios[dataset, concurrency, other].append(rate / base)
    return {key: median(values) for key, values in ratios.items()}


def verdict(sweep: Sweep, ratios: dict[Key, float]) -> str:
    """Where the adaptive arm is worst against the best of no speculation and all fixed widths."""
    if not ratios:
        return "adaptive / best: not measured"
    (dataset, concurrency, _), worst = min(ratios.items(), key=lambda item: item[1])
    label = " (SIMULATED acceptance)" if sweep.simulate_acc_len else ""
    where = f" on {dataset}" if len(sweep.datasets) > 1 else ""
    return f"adaptive / best: worst {worst:.3f} at concurrency {concurrency}{where}{label}"


def write_report(sweep: Sweep, records: list[Record], about: Record, out: Path) -> str:
    """Write `report.md` and the plots into `out`.

    Returns:
        The verdict, the report's last line.
    """
    table = medians(records)
    ratios = adaptive_ratios(sweep, records)
    last = verdict(sweep, ratios)
    differences = count_differences(sweep, records)
    lines = [f"# Serving sweep: {sweep.model}", "", *_about(sweep, about), ""]
    for dataset in sweep.datasets:
        lines += [f"## {dataset.name}", "", *_markdown(sweep, table, ratios, dataset.name), ""]
        if any(key[0] == dataset.name for key in table):
            plot(sweep, table, dataset.name, out / f"{dataset.name}.png")
            lines += [
                f"![throughput, speed-up and latency, {dataset.name}]({dataset.name}.png)",
                "",
            ]
    if not sweep.simulate_acc_len:
        for arm, (wrong, total) in differences.items():
            lines.append(
                f"{arm}: {total - wrong} of {total} answers equal those without speculation."
            )
        lines.append("")
    (out / "report.md").write_text("\n".join([*lines, last, ""]))
    return last


def _about(sweep: Sweep, about: Record) -> list[str]:
    lines = [f"- {name}: {value}" for name, value in about.items()]
    if sweep.simulate_acc_len:
        lines.insert(
            0,
            f"**SIMULATED acceptance of {sweep.simulate_acc_len} tokens a step: speeds show what a "
            "drafter of that quality would give; the generated text is meaningless.**",
        )
        lines.insert(1, "")
    return lines


_COLUMNS: list[tuple[str, str, str]] = [
    ("tok/s", "output_tok_s", ".1f"),
    ("TTFT p50", "ttft_p50_ms", ".0f"),
    ("p99", "ttft_p99_ms", ".0f"),
    ("TPOT p50", "tpot_p50_ms", ".1f"),
    ("p99", "tpot_p99_ms", ".1f"),
    ("E2E p50", "e2e_latency_p50_ms", ".0f"),
    ("p99", "e2e_latency_p99_ms", ".0f"),
    ("accept length", "accept_length", ".2f"),
    ("width", "mean_width", ".2f"),
    ("errors", "errors", "d"),
    ("repeats", "repeats", "d"),
]


def _markdown(
    sweep: Sweep, table: dict[Key, Record], ratios: dict[Key, float], dataset: str
) -> list[str]:
    baseline = next((arm.name for arm in sweep.arms if arm.kind == "none"), None)
    titles = [
        "concurrency",
        "arm",
        "speed-up",
        "adaptive / it",
        *(title for title, _, _ in _COLUMNS),
    ]
    lines = [" | ".join(["", *titles, ""]).strip(), "|" + "---|" * len(titles)]
    for concurrency in sweep.concurrency:
        base = table.get((dataset, concurrency, baseline or ""))
        for arm in sweep.arms:
            figures = table.get((dataset, concurrency, arm.name))
            if figures is None:
                continue
            gain = figures["output_tok_s"] / base["output_tok_s"] if base else None
            row = [str(concurrency), arm.name, _show(gain, ".2f")]
            row.append(_show(ratios.get((dataset, concurrency, arm.name)), ".3f"))
            row += [_show(figures.get(name), spec) for _, name, spec in _COLUMNS]
            lines.append("| " + " | ".join(row) + " |")
    lines += ["", "Medians over the repeats; latencies in ms. `adaptive / it`: throughput of the"]
    lines += ["adaptive arm over this arm's in the same repeat, median over the repeats."]
    return lines


def _show(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def plot(sweep: Sweep, table: dict[Key, Record], dataset: str, path: Path) -> None:
    """Throughput and speed-up against concurrency, time per token against throughput."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    baseline = next((arm.name for arm in sweep.arms if arm.kind == "none"), None)

    def series(arm: str, value: Callable[[Record, int], float | None]) -> list[float | None]:
        return [
            value(table[dataset, c, arm], c) if (dataset, c, arm) in table else None
            for c in sweep.concurrency
        ]

    def speedup(figures: Record, concurrency: int) -> float | None:
        base = table.get((dataset, concurrency, baseline or ""))
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
