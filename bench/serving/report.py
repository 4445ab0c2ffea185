"""Tables, plots and the verdict of a sweep."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.serving.plan import Cell, Sweep, cell_of, cells

Records = list[dict[str, Any]]
LOAD = ["dataset", "concurrency"]
COLUMNS = {  # of the table: a figure's title and format
    "output_tok_s": ("tok/s", ".1f"),
    "ttft_p50_ms": ("TTFT p50", ".0f"),
    "ttft_p99_ms": ("TTFT p99", ".0f"),
    "tpot_p50_ms": ("TPOT p50", ".1f"),
    "tpot_p99_ms": ("TPOT p99", ".1f"),
    "e2e_latency_p50_ms": ("E2E p50", ".0f"),
    "e2e_latency_p99_ms": ("E2E p99", ".0f"),
    "accept_length": ("accept length", ".2f"),
    "mean_width": ("width", ".2f"),
    "errors": ("errors", ".0f"),
    "repeats": ("repeats", ".0f"),
}


def is_whole(record: dict[str, Any]) -> bool:
    """Whether every request of a cell was answered."""
    return "failed" not in record and not record["errors"]


def missing_cells(sweep: Sweep, records: Records) -> list[Cell]:
    """Cells without which the verdict is not whole: failed, with errors, or not measured."""
    good = {cell_of(record) for record in records if is_whole(record)}
    judged = {*sweep.rivals, sweep.adaptive}
    return [cell for cell in cells(sweep) if cell.arm in judged and cell not in good]


def measured(records: Records) -> Records:
    return [record for record in records if "failed" not in record]


def medians(records: Records) -> pd.DataFrame:
    """Medians of every figure over the repeats, and the sum of errors, by load and arm."""
    figures = [name for name in COLUMNS if name not in ("errors", "repeats")]
    table = pd.DataFrame(measured(records), columns=[*LOAD, "arm", "errors", *figures])
    groups = table.astype(dict.fromkeys(figures, float)).groupby([*LOAD, "arm"], sort=False)
    return groups[figures].median().assign(errors=groups["errors"].sum(), repeats=groups.size())


def rates(records: Records) -> pd.DataFrame:
    """Output tokens per second: a row for each load and repeat, a column for each arm."""
    table = pd.DataFrame(measured(records), columns=[*LOAD, "repeat", "arm", "output_tok_s"])
    by = [*LOAD, "repeat"]
    return table.pivot_table("output_tok_s", by, "arm", aggfunc="last", sort=False)


def compare(records: Records, arm: str, other: str) -> pd.DataFrame:
    """Throughput of one arm over another's, by load, over the repeats that measured both.

    Returns:
        `of_medians`, the median over the repeats of the one over that of the other; `median`,
        `least` and `greatest` of the ratio in each repeat, where both met the same prompts.
    """
    both = rates(records).reindex(columns=[arm, other]).dropna()
    middle = both.groupby(LOAD, sort=False).median()
    within = (both[arm] / both[other]).groupby(LOAD, sort=False)
    return pd.DataFrame(
        {
            "of_medians": middle[arm] / middle[other],
            "median": within.median(),
            "least": within.min(),
            "greatest": within.max(),
        }
    )


def adaptive_ratios(sweep: Sweep, records: Records) -> pd.DataFrame:
    """The adaptive arm against each arm that it must not lose to, by load and rival."""
    by_rival = {rival: compare(records, sweep.adaptive or "", rival) for rival in sweep.rivals}
    return pd.concat(by_rival, names=["rival"]).reorder_levels([*LOAD, "rival"])


def held_out_ratios(sweep: Sweep, records: Records) -> dict[int, list[float]]:
    """The adaptive arm against the best other arm, without the luck that made that arm look best.

    The best of several noisy medians is partly the luckiest: an arm exactly as good as all others
    would be held to be worse than it. Here the best arm of a load is named by all repeats but one,
    and the ratio is taken in that one, in turn.

    Returns:
        By concurrency, one ratio for each dataset and repeat that all arms were measured in; empty
        with less than two repeats.
    """
    ratios: dict[int, list[float]] = defaultdict(list)
    judged = [*sweep.rivals, sweep.adaptive or ""]
    whole = rates(records).reindex(columns=judged).dropna()
    for (_, concurrency), load in whole.groupby(LOAD):
        for held_out in load.index if len(load) > 1 else ():
            best = load[sweep.rivals].drop(held_out).mean().idxmax()
            ratios[concurrency].append(load.loc[held_out, judged[-1]] / load.loc[held_out, best])
    return dict(ratios)


def count_differences(sweep: Sweep, records: Records) -> dict[str, tuple[int, int]]:
    """Per arm, how many answers differ from those without speculation, and of how many."""
    answers = {cell_of(record): record["outputs"] for record in measured(records)}
    counts: dict[str, tuple[int, int]] = {}
    for cell, outputs in answers.items():
        expected = answers.get(cell.model_copy(update={"arm": sweep.baseline}))
        if expected and cell.arm != sweep.baseline:
            wrong, total = counts.get(cell.arm, (0, 0))
            wrong += sum(a != b for a, b in zip(expected, outputs, strict=True))
            counts[cell.arm] = wrong, total + len(outputs)
    return counts


def verdict(sweep: Sweep, records: Records) -> str:
    """Where the adaptive arm is worst against the best of no speculation and all fixed widths.

    Best is the rival with the highest median over the repeats.
    """
    ratios = adaptive_ratios(sweep, records)["of_medians"]
    if ratios.empty:
        return "adaptive / best: not measured"
    dataset, concurrency, _ = ratios.idxmin()
    where = f" on {dataset}" if len(sweep.datasets) > 1 else ""
    label = " (SIMULATED acceptance)" if sweep.simulate_acc_len else ""
    if missing := missing_cells(sweep, records):
        label += f" (INCOMPLETE: {len(missing)} cells failed, had errors or were not measured)"
    return f"adaptive / best: worst {ratios.min():.3f} at concurrency {concurrency}{where}{label}"


def write_report(
    sweep: Sweep, records: Records, gaps: dict[str, str], command: str, out: Path
) -> str:
    """Write `report.md` and the plots into `out`.

    Args:
        sweep: The plan.
        records: Of all cells, failed ones too.
        gaps: What has no cells, or not all, as arms and repeats, and why.
        command: What measured them.
        out: Destination.

    Returns:
        The verdict, the report's last line.
    """
    table, last = medians(records), verdict(sweep, records)
    parts = [f"# Serving sweep: {sweep.model}", _about(sweep, records, command)]
    failed = [f"- {what}: {reason}" for what, reason in gaps.items()]
    failed += [f"- {name_of(cell_of(r))}: {r['failed']}" for r in records if "failed" in r]
    if failed:
        parts += ["## What failed or was left out", "\n".join(failed)]
    for dataset in (each.name for each in sweep.datasets):
        if dataset not in table.index:
            continue
        parts += [f"## {dataset}", _table(sweep, records, table.loc[dataset], dataset)]
        parts.append(f"![throughput, speed-up and latency, {dataset}]({dataset}.png)")
        _plot(sweep, table.loc[dataset], dataset, out / f"{dataset}.png")
    parts += _noise(sweep, records) + _held_out(sweep, records)
    if not sweep.simulate_acc_len:
        parts += [
            f"{arm}: {total - wrong} of {total} answers equal those without speculation."
            for arm, (wrong, total) in count_differences(sweep, records).items()
        ]
    ratios = adaptive_ratios(sweep, records)
    if len(ratios):
        dataset, concurrency, rival = ratios["median"].idxmin()
        worst = _spread(ratios.loc[dataset, concurrency, rival])
        where = f"{rival} at concurrency {concurrency} on {dataset}"
        parts.append(f"Within the repeats the worst is {worst} against {where}.")
    (out / "report.md").write_text("\n\n".join([*parts, last]) + "\n")
    return last


def name_of(cell: Cell) -> str:
    return f"{cell.arm}, {cell.dataset}, concurrency {cell.concurrency}, repeat {cell.repeat}"


def _about(sweep: Sweep, records: Records, command: str) -> str:
    origins = Counter(tuple(record["made_with"].items()) for record in records)
    lines = [f"- command: {command}"]
    if len(origins) == 1:
        lines += [f"- {name}: {value}" for name, value in next(iter(origins))]
    elif origins:
        lines += ["", "**The cells do not belong together: they were measured with**", ""]
        for origin, count in origins.items():
            described = "; ".join(f"{name}: {value}" for name, value in origin)
            lines.append(f"- {count} cells: {described}")
    if sweep.simulate_acc_len:
        drafter = "" if sweep.draft else ", by a drafter with random weights"
        warning = (
            f"**SIMULATED acceptance of {sweep.simulate_acc_len} tokens a step{drafter}: speeds "
            "show what a drafter of that quality would give; the generated text is meaningless.**"
        )
        lines = [warning, "", *lines]
    return "\n".join(lines)


def _table(sweep: Sweep, records: Records, table: pd.DataFrame, dataset: str) -> str:
    """One row a concurrency and arm; `table` has the medians of this dataset."""
    ratios, rows = adaptive_ratios(sweep, records), []
    for concurrency, arm in ((c, a.name) for c in sweep.concurrency for a in sweep.arms):
        if (concurrency, arm) not in table.index:
            continue
        figures, base = table.loc[concurrency, arm], (concurrency, sweep.baseline)
        gain = figures["output_tok_s"] / table["output_tok_s"].get(base, np.nan)
        row = {"concurrency": str(concurrency), "arm": arm, "speed-up": _show(gain, ".2f")}
        known = (dataset, concurrency, arm) in ratios.index
        ratio = ratios.loc[dataset, concurrency, arm] if known else None
        row["adaptive / it"] = f"{ratio['of_medians']:.3f}" if known else "–"
        row["within repeats"] = _spread(ratio) if known else "–"
        rows.append(row | {title: _show(figures[n], spec) for n, (title, spec) in COLUMNS.items()})
    return _markdown(rows) + (
        "\n\nMedians over the repeats; latencies in ms. `adaptive / it`: the adaptive arm's\n"
        "median throughput over this arm's. `within repeats`: the same ratio in every repeat,\n"
        "where both had the same prompts: median (least to greatest)."
    )


def _noise(sweep: Sweep, records: Records) -> list[str]:
    """How far measurements of the same thing lie apart."""
    again = [arm.name for arm in sweep.arms if arm.kind == "none" and arm.name != sweep.baseline]
    rows = [
        {
            "dataset": dataset,
            "concurrency": str(concurrency),
            "arm": arm,
            f"arm / {sweep.baseline}": f"{ratio['of_medians']:.3f}",
            "within repeats": _spread(ratio),
        }
        for arm in again
        for (dataset, concurrency), ratio in compare(records, arm, sweep.baseline or "").iterrows()
    ]
    said = "What differs from 1 here is the machine; so is that much of any other ratio."
    return ["## Noise: the same server twice", _markdown(rows), said] if rows else []


def _held_out(sweep: Sweep, records: Records) -> list[str]:
    ratios = held_out_ratios(sweep, records)
    named = {str(c): values for c, values in sorted(ratios.items())}
    named["all"] = [ratio for values in ratios.values() for ratio in values]
    rows = []
    for name, values in named.items() if ratios else ():
        logs = np.log(values)
        mean = np.exp(logs.mean())
        error = mean * logs.std(ddof=1) / len(logs) ** 0.5 if len(logs) > 1 else np.nan
        row = {"concurrency": name, "adaptive / best, geometric mean": f"{mean:.3f}"}
        rows.append(row | {"standard error": _show(error, ".3f"), "ratios": str(len(values))})
    title = "## Adaptive against the arm that was best in the other repeats"
    said = "Best by medians over all repeats, as above, is partly luck; this is not."
    return [title, _markdown(rows), said] if rows else []


def _plot(sweep: Sweep, table: pd.DataFrame, dataset: str, path: Path) -> None:
    """Throughput and speed-up against concurrency, time per token against throughput."""
    from matplotlib.figure import Figure

    shown = [arm.name for arm in sweep.arms if arm.name in table.index.get_level_values("arm")]
    rate = table["output_tok_s"].unstack("arm")[shown]
    tpot = table["tpot_p50_ms"].unstack("arm")
    figure = Figure(figsize=(15, 4.5), layout="tight")
    left, middle, right = figure.subplots(1, 3)
    rate.plot(ax=left, marker="o", markersize=4, ylabel="output tokens/s")
    if sweep.baseline in rate:
        gain = rate.div(rate[sweep.baseline], axis=0)
        gain.plot(ax=middle, marker="o", markersize=4, legend=False, ylabel="speed-up over none")
    for axes in (left, middle):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sweep.concurrency, [str(c) for c in sweep.concurrency])
        axes.set_xlabel("requests in flight")
    for arm in shown:
        right.plot(rate[arm], tpot[arm], marker="o", markersize=4)
    right.set_xlabel("output tokens/s")
    right.set_ylabel("median time per output token, ms")
    simulated = f" (SIMULATED acceptance of {sweep.simulate_acc_len} tokens)"
    figure.suptitle(f"{sweep.model}, {dataset}" + (simulated if sweep.simulate_acc_len else ""))
    figure.savefig(path, dpi=110)


def _markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(ratio: pd.Series) -> str:
    return f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['greatest']:.3f})"


def _show(value: float, spec: str) -> str:
    return "–" if pd.isna(value) else format(value, spec)
