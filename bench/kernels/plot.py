"""Tables, verdicts and a roofline plot from the JSON lines of the kernel benchmarks.

    python bench/kernels/plot.py append.jsonl attention.jsonl --png roofline.png > table.md

The verdicts on the targets, which come first in the table, also go to stderr.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from targets import Line, cell_of, cells, layer_times, summary, verdicts


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(line: Line, name: str, digits: int) -> str:
    return "" if line[name] is None else f"{line[name]:.{digits}f}"


def arm_table(lines: list[Line]) -> str:
    """A row per operator, shape and arm, with the arm's time over that of dflare."""
    measured = cells(lines)
    head = ["operator", "shape", "arm", "us", "p20-p80", "GB/s", "% of bandwidth", "TFLOP/s"]
    head += ["x floor", "x dflare", "plan us", "error"]
    rows = []
    for x in lines:
        cell = cell_of(x)
        row = [x["op"], str(cell), x["arm"] + (f" ({x['note']})" if x["note"] else "")]
        if "failure" in x:
            rows.append([*row, f"not measured: {x['failure']}", *[""] * (len(head) - 4)])
            continue
        ours = measured[cell].get("dflare")
        row += [f"{x['us']:.1f}", f"{x['us_p20']:.1f}-{x['us_p80']:.1f}"]
        row += [shown(x, "gb_s", 0), shown(x, "percent_of_bandwidth", 0), shown(x, "tflop_s", 1)]
        row += [shown(x, "times_floor", 2), f"{x['us'] / ours['us']:.2f}" if ours else ""]
        row += [shown(x, "plan_us", 0)]
        row += ["" if x["relative_error"] is None else f"{x['relative_error']:.1e}"]
        rows.append(row)
    return markdown(head, rows)


def layer_table(lines: list[Line]) -> str:
    """A row per attention shape and arm: what a layer takes with everything that belongs to it."""
    head = ("shape", "arm", "kernel us", "prologue us", "once a step / layers us", "total us")
    rows = []
    for cell, arms in cells(lines).items():
        times = layer_times(arms) if cell.op == "block_attention" else {}
        if "dflare" not in times:
            continue
        ours = times["dflare"].total
        for name, time in sorted(times.items(), key=lambda item: item[1].total):
            parts = [f"{us:.1f}" for us in (time.kernel, time.prologue, time.per_step, time.total)]
            rows.append([str(cell), name, *parts, f"{time.total / ours:.2f}"])
    return markdown((*head, "x dflare"), rows)


def roofline(lines: list[Line], path: Path) -> None:
    """Operations a second over operations a byte, a panel an operator, under measured peaks."""
    chosen = [x for x in lines if x.get("flops")]
    ops = sorted({line["op"] for line in chosen})
    arms = sorted({line["arm"] for line in chosen})
    colors = {arm: f"C{i}" for i, arm in enumerate(arms)}  # the same in all panels
    figure, axes = plt.subplots(1, len(ops), figsize=(7 * len(ops), 5), squeeze=False)
    for axis, op in zip(axes[0], ops, strict=True):
        of_op = [x for x in chosen if x["op"] == op]
        by_arm: dict[str, list[Line]] = defaultdict(list)
        for line in of_op:
            by_arm[line["arm"]].append(line)
        peak_gb_s = max(x["peak_gb_s"] for x in of_op)
        peak_tflop_s = max(x["peak_tflop_s"] for x in of_op)
        ridge = peak_tflop_s * 1e3 / peak_gb_s
        intensities = [x["flops"] / x["bytes"] for x in of_op]
        ends = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
        axis.plot(
            [ends[0], ridge, ends[1]],
            [ends[0] * peak_gb_s / 1e3, peak_tflop_s, peak_tflop_s],
            color="black",
            linewidth=1,
            label=f"measured peaks: {peak_gb_s:.4g} GB/s, {peak_tflop_s:.3g} TFLOP/s",
        )
        for arm, points in sorted(by_arm.items()):
            axis.plot(
                [x["flops"] / x["bytes"] for x in points],
                [x["flops"] / x["us"] / 1e6 for x in points],
                "o",
                color=colors[arm],
                markersize=8 if arm == "dflare" else 5,
                label=arm,
            )
        axis.set(xscale="log", yscale="log", title=op)
        axis.set(xlabel="operations per byte of the least traffic", ylabel="TFLOP/s")
        axis.grid(which="both", alpha=0.2)
        axis.legend(fontsize=8)
    first = lines[0]
    figure.suptitle(f"{first.get('gpu') or first.get('cpu')}, torch {first['versions']['torch']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(command: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--png", type=Path, help="where the roofline plot goes")
    arguments = parser.parse_args(command)
    texts = [path.read_text() for path in arguments.results]
    lines = [json.loads(line) for text in texts for line in text.splitlines() if line]
    if not any("us" in line for line in lines):
        print(f"{', '.join(map(str, arguments.results))}: nothing was measured", file=sys.stderr)
        return 1
    rows = summary(verdicts(lines))
    for target, verdict, detail in rows:
        print(f"{verdict:32} {target}  ({detail})", file=sys.stderr)
    print(f"## Targets\n\n{markdown(('target', 'verdict', 'cells'), rows)}\n")
    if any(line["device"] == "cuda" for line in lines):
        print(f"## A layer of attention with all that it takes\n\n{layer_table(lines)}\n")
    print(f"## Arms\n\n{arm_table(lines)}")
    if arguments.png:
        roofline(lines, arguments.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
