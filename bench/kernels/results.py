"""JSON lines and terminal rows of kernel benchmarks."""

import json
import sys
from typing import Any

import torch
from device import Peaks
from measure import Arm


def quantile(values: list[float], q: float) -> float:
    return torch.tensor(values).quantile(q).item()


def result_line(arm: Arm, peaks: Peaks) -> dict[str, Any]:
    """What was measured of an arm. Figures that follow from its work are None where it has none."""
    median = quantile(arm.us, 0.5)
    line: dict[str, Any] = {
        "us": round(median, 2),
        "us_p20": round(quantile(arm.us, 0.2), 2),
        "us_p80": round(quantile(arm.us, 0.8), 2),
        "rounds": len(arm.us),
        "cuda_graph": arm.graph,
        "plan_us": None if arm.plan_us is None else round(arm.plan_us, 2),
        "relative_error": arm.error,
    }
    names = ("bytes", "flops", "gb_s", "tflop_s", "percent_of_bandwidth", "percent_of_compute")
    line |= dict.fromkeys((*names, "floor_us", "times_floor"))
    if arm.work:
        work_bytes, flops = arm.work
        gb_s, tflop_s = work_bytes / median / 1e3, flops / median / 1e6
        floor = peaks.floor_us(work_bytes, flops)
        line |= {
            "bytes": work_bytes,
            "flops": flops,
            "gb_s": round(gb_s, 1),
            "tflop_s": round(tflop_s, 2),
            "percent_of_bandwidth": round(100 * gb_s / peaks.gb_s, 1),
            "percent_of_compute": round(100 * tflop_s / peaks.tflop_s, 1),
            "floor_us": round(floor, 2),
            "times_floor": round(median / floor, 2),
        }
    return line


def report(
    op: str, shape: dict[str, Any], arms: list[Arm], peaks: Peaks, setting: dict[str, Any]
) -> list[dict[str, Any]]:
    """Prints a JSON line per arm on stdout and a row each on stderr; returns the lines.

    An arm that failed has a line with `failure` and no times.
    """
    print(f"\n{op}  {' '.join(f'{k}={v}' for k, v in shape.items())}", file=sys.stderr)
    measured = {
        "peak_read_gb_s": round(peaks.read_gb_s, 1),
        "peak_copy_gb_s": round(peaks.copy_gb_s, 1),
        "peak_gb_s": round(peaks.gb_s, 1),
        "peak_tflop_s": round(peaks.tflop_s, 2),
    }
    lines = []
    for arm in arms:
        line = {"op": op, "arm": arm.name, "note": arm.note, **shape}
        line |= {"failure": arm.failure} if arm.failure else result_line(arm, peaks)
        line |= measured | setting
        print(json.dumps(line), flush=True)
        print(terminal_row(line), file=sys.stderr)
        lines.append(line)
    return lines


def terminal_row(line: dict[str, Any]) -> str:
    if "failure" in line:
        return f"  {line['arm']:20} {line['failure']}"
    row = f"  {line['arm']:20} {line['us']:10.1f} us  ({line['us_p20']}-{line['us_p80']})"
    if line["times_floor"] is not None:
        row += f"  {line['times_floor']:6.2f} x floor  {line['percent_of_bandwidth']:5.1f} % bw"
    if line["plan_us"] is not None:
        row += f"  plan {line['plan_us']:.0f} us"
    if line["relative_error"] is not None:
        row += f"  error {line['relative_error']:.1e}"
    if not line["cuda_graph"] and line["device"] == "cuda":
        row += "  not in a graph"
    return f"{row}  {line['note']}"
