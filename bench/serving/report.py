"""Tables and the verdict of a sweep."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.serving.held_out import held_out_table
from bench.serving.plan import Cell, Sweep, cell_of, cells
from bench.serving.records import measured, throughput_by_load
from bench.serving.sweep_plot import Key, Record, plot


class Ratio(NamedTuple):
    """Throughput of one arm over another's under the same load.

    Attributes:
        of_medians: Median over the repeats of the one, over that of the other.
        within: The ratio in each repeat: there both met the same prompts.
    """

    of_medians: float
    within: list[float]


def is_whole(record: Record) -> bool:
    """Whether every request of a cell was answered."""
    return "failed" not in record and not record["errors"]


def medians(records: Iterable[Record]) -> dict[Key, Record]:
    """Per dataset, concurrency and arm the median of every figure over the repeats.

    Errors are summed.
    """
    runs: dict[Key, list[Record]] = defaultdict(list)
    for record in measured(records):
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
    records = measured(records)
    reference = {
        (r["dataset"], r["concurrency"], r["repeat"]): r["outputs"]
        for r in records
        if r["arm"] == sweep.baseline
    }
    counts: dict[str, tuple[int, int]] = {}
    for record in records:
        expected = reference.get((record["dataset"], record["concurrency"], record["repeat"]))
        if expected and record["arm"] != sweep.baseline:
            wrong, total = counts.get(record["arm"], (0, 0))
            pairs = list(zip(expected, record["outputs"], strict=True))
            counts[record["arm"]] = (wrong + sum(a != b for a, b in pairs), total + len(pairs))
    return counts


def compare(records: Iterable[Record], arm: str, other: str) -> dict[tuple[str, int], Ratio]:
    """Hold an arm against another, over the repeats that measured both.

    Returns:
        By dataset and concurrency.
    """
    ratios = {}
    for load, by_arm in throughput_by_load(records).items():
        ours, theirs = by_arm[arm], by_arm[other]
        if repeats := sorted(ours.keys() & theirs.keys()):
            ratios[load] = Ratio(
                median(ours[i] for i in repeats) / median(theirs[i] for i in repeats),
                [ours[i] / theirs[i] for i in repeats],
            )
    return ratios


def adaptive_ratios(sweep: Sweep, records: Iterable[Record]) -> dict[Key, Ratio]:
    """The adaptive arm against each arm that it must not lose to."""
    if sweep.adaptive is None:
        return {}
    return {
        (dataset, concurrency, rival): ratio
        for rival in sweep.rivals
        for (dataset, concurrency), ratio in compare(records, sweep.adaptive, rival).items()
    }


def missing_cells(sweep: Sweep, records: Iterable[Record]) -> list[Cell]:
    """Cells without which the verdict is not whole: failed, with errors, or not measured."""
    good = {cell_of(record) for record in records if is_whole(record)}
    judged = {*sweep.rivals, sweep.adaptive}
    return [cell for cell in cells(sweep) if cell.arm in judged and cell not in good]


def verdict(sweep: Sweep, records: Iterable[Record]) -> str:
    """Where the adaptive arm is worst against the best of no speculation and all fixed widths.

    Best is the rival with the highest median over the repeats.
    """
    records = list(records)
    ratios = adaptive_ratios(sweep, records)
    if not ratios:
        return "adaptive / best: not measured"
    (dataset, concurrency, _), worst = min(ratios.items(), key=lambda item: item[1].of_medians)
    where = f" on {dataset}" if len(sweep.datasets) > 1 else ""
    label = " (SIMULATED acceptance)" if sweep.simulate_acc_len else ""
    if missing := missing_cells(sweep, records):
        label += f" (INCOMPLETE: {len(missing)} cells failed, had errors or were not measured)"
    return (
        f"adaptive / best: worst {worst.of_medians:.3f} at concurrency {concurrency}{where}{label}"
    )


def write_report(
    sweep: Sweep, records: list[Record], gaps: dict[str, str], command: str, out: Path
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
    table = medians(records)
    ratios = adaptive_ratios(sweep, records)
    last = verdict(sweep, records)
    lines = [f"# Serving sweep: {sweep.model}", "", *_about(sweep, records, command), ""]
    lines += _failures(records, gaps)
    for dataset in sweep.datasets:
        lines += [f"## {dataset.name}", "", *_markdown(sweep, table, ratios, dataset.name), ""]
        if any(key[0] == dataset.name for key in table):
            plot(sweep, table, dataset.name, out / f"{dataset.name}.png")
            lines += [
                f"![throughput, speed-up and latency, {dataset.name}]({dataset.name}.png)",
                "",
            ]
    lines += _noise(sweep, records)
    lines += held_out_table(sweep, records)
    if not sweep.simulate_acc_len:
        for arm, (wrong, total) in count_differences(sweep, records).items():
            lines.append(
                f"{arm}: {total - wrong} of {total} answers equal those without speculation."
            )
        lines.append("")
    if ratios:
        worst = min(ratios.items(), key=lambda item: median(item[1].within))
        (dataset_name, concurrency, rival), ratio = worst
        lines += [
            f"Within the repeats the worst is {_spread(ratio)} against {rival} at concurrency "
            f"{concurrency} on {dataset_name}.",
            "",
        ]
    (out / "report.md").write_text("\n".join([*lines, last, ""]))
    return last


def _about(sweep: Sweep, records: list[Record], command: str) -> list[str]:
    lines = [f"- command: {command}"]
    origins: dict[tuple[tuple[str, str], ...], int] = defaultdict(int)
    for record in records:
        origins[tuple(record["made_with"].items())] += 1
    if len(origins) > 1:
        lines += ["", "**The cells do not belong together: they were measured with**", ""]
    for origin, count in origins.items():
        named = [f"{name}: {value}" for name, value in origin]
        lines += (
            [f"- {name}" for name in named]
            if len(origins) == 1
            else [f"- {count} cells: {'; '.join(named)}"]
        )
    if sweep.simulate_acc_len:
        drafter = "" if sweep.draft else ", by a drafter with random weights"
        lines = [
            f"**SIMULATED acceptance of {sweep.simulate_acc_len} tokens a step{drafter}: speeds "
            "show what a drafter of that quality would give; the generated text is meaningless.**",
            "",
            *lines,
        ]
    return lines


def _failures(records: list[Record], gaps: dict[str, str]) -> list[str]:
    lines = [f"- {what}: {reason}" for what, reason in gaps.items()]
    lines += [
        f"- {r['arm']}, {r['dataset']}, concurrency {r['concurrency']}, repeat {r['repeat']}: "
        f"{r['failed']}"
        for r in records
        if "failed" in r
    ]
    return ["## What failed or was left out", "", *lines, ""] if lines else []


def _noise(sweep: Sweep, records: list[Record]) -> list[str]:
    """How far measurements of the same thing lie apart."""
    again = [arm.name for arm in sweep.arms if arm.kind == "none" and arm.name != sweep.baseline]
    rows = [
        f"| {dataset} | {concurrency} | {arm} | {ratio.of_medians:.3f} | {_spread(ratio)} |"
        for arm in again
        for (dataset, concurrency), ratio in compare(records, arm, sweep.baseline or "").items()
    ]
    if not rows:
        return []
    titles = ["dataset", "concurrency", "arm", f"arm / {sweep.baseline}", "within repeats"]
    return [
        "## Noise: the same server twice",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *rows,
        "",
        "What differs from 1 here is the machine; so is that much of any other ratio.",
        "",
    ]


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
    sweep: Sweep, table: dict[Key, Record], ratios: dict[Key, Ratio], dataset: str
) -> list[str]:
    titles = ["concurrency", "arm", "speed-up", "adaptive / it", "within repeats"]
    titles += [title for title, _, _ in _COLUMNS]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for concurrency in sweep.concurrency:
        base = table.get((dataset, concurrency, sweep.baseline or ""))
        for arm in sweep.arms:
            figures = table.get((dataset, concurrency, arm.name))
            if figures is None:
                continue
            gain = figures["output_tok_s"] / base["output_tok_s"] if base else None
            ratio = ratios.get((dataset, concurrency, arm.name))
            row = [str(concurrency), arm.name, _show(gain, ".2f")]
            row += [_show(ratio.of_medians if ratio else None, ".3f")]
            row += [_spread(ratio) if ratio else "–"]
            row += [_show(figures.get(name), spec) for _, name, spec in _COLUMNS]
            lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        "Medians over the repeats; latencies in ms. `adaptive / it`: the adaptive arm's median",
        "throughput over this arm's. `within repeats`: the same ratio in every repeat, where both",
        "had the same prompts: median (least to greatest).",
    ]
    return lines


def _spread(ratio: Ratio) -> str:
    within = ratio.within
    return f"{median(within):.3f} ({min(within):.3f} to {max(within):.3f})"


def _show(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)
