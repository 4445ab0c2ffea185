"""A Markdown table of benchmark lines: a row an arm, and a row for what a layer takes in all."""

import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]
SHAPE = ("model", "dtype", "rows", "commit_lens", "batch", "queries", "context", "page")
HEAD = ("operator", "shape", "arm", "us", "p20 to p80", "GB/s", "TFLOP/s", "x floor", "x dflare")
HEAD += ("error", "")
# What stock attention leaves out, and dflare makes once a step.
LIBRARIES = ("fa3", "flashinfer_fa2", "flashinfer_fa3", "flashinfer_uniform")


def row_for_a_terminal(line: Line) -> str:
    if "failure" in line:
        return f"  {line['arm']:20} {line['failure']}"
    row = (
        f"  {line['arm']:20} {line['us']:10.1f} us  ({line['us_p20']:.1f} to {line['us_p80']:.1f})"
    )
    if line.get("floor_us"):
        row += f"  {line['us'] / line['floor_us']:6.2f} x floor"
    if line["relative_error"] is not None:
        row += f"  error {line['relative_error']:.1e}"
    return f"{row}  {line['note']}"


def layer_us(arms: dict[str, Line], name: str) -> float | None:
    """Microseconds of an attention layer with all that belongs to it.

    To a library's arm belong norm, RoPE and the block's K/V write, and its share of a plan; to
    dflare its share of the schedule. None if a part was not measured.
    """
    parts = {"dflare": "schedule", **dict.fromkeys(LIBRARIES, "prologue")}
    other = arms.get(parts.get(name, ""))
    if name not in arms or other is None:
        return None
    layers = arms[name]["layers"]
    if name == "dflare":
        return arms[name]["us"] + other["us"] / layers
    return arms[name]["us"] + other["us"] + arms[name].get("plan_us", 0.0) / layers


def rows_of(cell: str, lines: list[Line]) -> list[list[str]]:
    """Of the arms that took turns at one shape."""
    arms = {line["arm"]: line for line in lines if "failure" not in line}
    ours, rows = arms.get("dflare"), []
    for line in lines:
        row = [line["op"], cell, line["arm"]]
        if "failure" in line:
            rows.append([*row, *[""] * 7, f"not measured: {line['failure']}"])
            continue
        us, floor = line["us"], line.get("floor_us")
        row += [f"{us:.1f}", f"{line['us_p20']:.1f} to {line['us_p80']:.1f}"]
        work = (line["bytes"] / us / 1e3, line["flops"] / us / 1e6) if floor else ()
        row += [f"{work[0]:.0f}", f"{work[1]:.2f}", f"{us / floor:.2f}"] if floor else [""] * 3
        row.append(f"{us / ours['us']:.2f}" if ours else "")
        error = line["relative_error"]
        row.append("" if error is None else f"{error:.1e}")
        planned = f"plan {line['plan_us']:.0f} us; " if "plan_us" in line else ""
        waits = "" if line["cuda_graph"] or line["device"] == "cpu" else "; not in a graph"
        rows.append([*row, planned + line["note"] + waits])
    our_layer = layer_us(arms, "dflare")
    for name in arms:
        layer = layer_us(arms, name)
        if layer is not None:
            over = f"{layer / our_layer:.2f}" if our_layer else ""
            rows.append(["layer in all", cell, name, f"{layer:.1f}", *[""] * 4, over, "", ""])
    return rows


def table(files: list[str]) -> str:
    """The lines of all files; only arms of one run and shape are compared.

    Raises:
        ValueError: there is no line.
    """
    texts = [Path(file).read_text() for file in files]
    lines = [json.loads(line) for text in texts for line in text.splitlines() if line]
    if not lines:
        raise ValueError(f"{', '.join(files)}: nothing was measured")
    cells: dict[tuple, list[Line]] = {}
    for line in lines:
        shape = " ".join(f"{name} {line[name]}" for name in SHAPE if name in line)
        cells.setdefault((line["op"], shape, line["command"], line["time"]), []).append(line)
    rows = [row for (_, shape, *_), found in cells.items() for row in rows_of(shape, found)]
    first = lines[0]
    peaks = f"{first['peak_gb_s']} GB/s and {first['peak_tflop_s']} TFLOP/s"
    return "\n".join(
        [
            f"{first['hardware']}, torch {first['versions']['torch']}; peaks as measured: {peaks}.",
            "",
            *(f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows)),
        ]
    )
