"""A table and a roofline plot from the JSON lines of the kernel benchmarks.

python bench/kernels/plot.py append.jsonl attention.jsonl --png roofline.png > table.md
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHAPE = ("model", "dtype", "rows", "batch", "context", "page")


def shape_of(line: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, line[name]) for name in SHAPE if name in line)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row per operator, shape and arm, with the arm's time over that of dflare."""
    ours = {(x["op"], shape_of(x)): x["us"] for x in lines if x["arm"] == "dflare"}
    head = ("operator", "shape", "arm", "us", "p20-p80", "GB/s", "% of bandwidth", "TFLOP/s")
    rows = [(*head, "x floor", "x dflare", "error")]
    rows.append(tuple("---" for _ in rows[0]))
    for x in lines:
        shape = " ".join(f"{name} {value}" for name, value in shape_of(x))
        base = ours.get((x["op"], shape_of(x)))
        rows.append(
            (
                x["op"],
                shape,
                x["arm"] + (f" ({x['note']})" if x["note"] else ""),
                f"{x['us']:.1f}",
                f"{x['us_p20']:.1f}-{x['us_p80']:.1f}",
                f"{x['gb_s']:.0f}",
                f"{x['percent_of_bandwidth']:.0f}",
                f"{x['tflop_s']:.1f}",
                f"{x['times_floor']:.2f}",
                f"{x['us'] / base:.2f}" if base else "",
                f"{x['relative_error']:.1e}" if x["relative_error"] is not None else "",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def roofline(lines: list[dict[str, Any]], path: Path) -> None:
    """Operations a second over operations a byte, a panel an operator, under measured peaks."""
    ops = sorted({line["op"] for line in lines})
    figure, axes = plt.subplots(1, len(ops), figsize=(7 * len(ops), 5), squeeze=False)
    for axis, op in zip(axes[0], ops, strict=True):
        chosen = [x for x in lines if x["op"] == op and x["arm"] not in ("schedule", "prologue")]
        by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in chosen:
            by_arm[line["arm"]].append(line)
        peak_gb_s, peak_tflop_s = chosen[0]["peak_gb_s"], chosen[0]["peak_tflop_s"]
        ridge = peak_tflop_s * 1e3 / peak_gb_s
        intensities = [x["flops"] / x["bytes"] for x in chosen]
        ends = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
        axis.plot(
            [ends[0], ridge, ends[1]],
            [ends[0] * peak_gb_s / 1e3, peak_tflop_s, peak_tflop_s],
            color="black",
            linewidth=1,
            label=f"measured peaks: {peak_gb_s:.0f} GB/s, {peak_tflop_s:.0f} TFLOP/s",
        )
        for arm, points in sorted(by_arm.items()):
            axis.plot(
                [x["flops"] / x["bytes"] for x in points],
                [x["flops"] / x["us"] / 1e6 for x in points],
                "o",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--png", type=Path, help="where the roofline plot goes")
    arguments = parser.parse_args()
    texts = [path.read_text() for path in arguments.results]
    lines = [json.loads(line) for text in texts for line in text.splitlines() if line]
    print(table(lines))
    if arguments.png:
        roofline(lines, arguments.png)


if __name__ == "__main__":
    main()
