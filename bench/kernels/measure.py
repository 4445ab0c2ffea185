"""Timing of kernel benchmarks: arms that take turns, cold caches, CUDA graphs, JSON lines.

An arm is one implementation. It is called on several sets of buffers in rotation, together larger
than the L2 cache, so that a call finds its weights and pools in memory, as it does between two
steps of a model. On a GPU one CUDA graph per arm runs all its sets; arms alternate within a round,
so that clocks and temperature move all of them alike. Numbers are medians over the rounds.
"""

import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Arm:
    """One implementation: `run(i)` calls it on buffer set i."""

    name: str
    run: Callable[[int], object]
    note: str = ""  # what the time includes or leaves out, if it is not the whole operator
    us: list[float] = field(default_factory=list)
    graph: bool = False
    error: float | None = None


@dataclass(frozen=True)
class Peaks:
    """What this device was measured to do, decimal units."""

    gb_s: float
    tflop_s: float

    def floor_us(self, work_bytes: float, flops: float) -> float:
        return max(work_bytes / self.gb_s / 1e3, flops / self.tflop_s / 1e6)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_peaks(device: str, dtype: torch.dtype) -> Peaks:
    """Bandwidth of a large copy (bytes read and written) and rate of a large matrix product."""
    copy_elements, size = (2**29, 8192) if device == "cuda" else (2**25, 1024)
    source = torch.randn(copy_elements, device=device, dtype=torch.float32).to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def best(run: Callable[[], object]) -> float:
        seconds = []
        for _ in range(12):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[2:])

    copied = 2 * source.numel() * source.element_size()
    return Peaks(
        gb_s=copied / best(lambda: target.copy_(source)) / 1e9,
        tflop_s=2 * size**3 / best(lambda: a @ b) / 1e12,
    )


def buffer_sets(device: str, bytes_per_set: int) -> int:
    """Sets that together exceed three times the last-level cache, within half of free memory."""
    if device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    free, _ = torch.cuda.mem_get_info()
    wanted = max(2, -(-3 * cache // bytes_per_set))
    return max(1, min(wanted, 64, free // 2 // bytes_per_set))


def capture(arm: Arm, sets: int) -> Callable[[], None]:
    """A replay of all sets; plain calls where the arm cannot be captured."""
    for i in range(sets):
        arm.run(i)  # warm-up: module load, workspaces, autotuning
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(sets):
                arm.run(i)
    except RuntimeError as error:
        print(f"{arm.name}: not in a CUDA graph ({str(error).splitlines()[0]})", file=sys.stderr)
        torch.cuda.synchronize()
        return lambda: [arm.run(i) for i in range(sets)] and None
    arm.graph = True
    return graph.replay


def time_on_gpu(arms: list[Arm], sets: int, rounds: int) -> None:
    replays = [capture(arm, sets) for arm in arms]
    for turn in range(rounds):
        for k in range(len(arms)):
            arm, replay = list(zip(arms, replays, strict=True))[(turn + k) % len(arms)]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            arm.us.append(begin.elapsed_time(end) * 1e3 / sets)


def time_on_cpu(arms: list[Arm], sets: int, rounds: int) -> None:
    for arm in arms:
        for i in range(sets):
            arm.run(i)
    for turn in range(rounds):
        for k in range(len(arms)):
            arm = arms[(turn + k) % len(arms)]
            start = time.perf_counter()
            for i in range(sets):
                arm.run(i)
            arm.us.append((time.perf_counter() - start) * 1e6 / sets)


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest |got - expected| / |expected| of the tensors; NaN stays NaN."""
    pairs = zip(got, expected, strict=True)
    return max(((g.double() - e).norm() / e.norm()).item() for g, e in pairs)


def profile(arm: Arm) -> None:
    """One call between profiler marks, for `ncu --profile-from-start off`."""
    arm.run(0)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    arm.run(0)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions that a number needs beside it."""
    packages = ("torch", "triton", "sglang", "flashinfer-python", "sglang-kernel", "sgl-kernel")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    info: dict[str, Any] = {"versions": found, "python": platform.python_version()}
    info["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    info["command"] = " ".join(["python", *sys.argv])
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    info["revision"] = revision.stdout.strip() or "unknown"
    if device == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return info | {"cpu": (names or [platform.processor()])[0], "threads": num_threads()}
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    fields = [value.strip() for value in smi.stdout.splitlines()[0].split(",")]
    names = ("gpu", "driver", "sm_clock", "memory_clock", "power_limit")
    return info | dict(zip(names, fields, strict=True)) | {"cuda": torch.version.cuda}


def num_threads() -> int:
    return torch.get_num_threads()


def quantile(values: list[float], q: float) -> float:
    return torch.tensor(values).quantile(q).item()


def report(
    op: str,
    shape: dict[str, Any],
    arms: list[Arm],
    work: tuple[float, float],
    peaks: Peaks,
    setting: dict[str, Any],
    per_arm: dict[str, dict[str, float]] | None = None,
) -> None:
    """A JSON line per arm on stdout and a table row each on stderr.

    per_arm: further fields, each with its value by the name of the arms that have it.
    """
    work_bytes, flops = work
    floor = peaks.floor_us(work_bytes, flops)
    title = " ".join(f"{name}={value}" for name, value in shape.items())
    print(f"\n{op}  {title}  floor {floor:.1f} us", file=sys.stderr)
    for arm in arms:
        median = quantile(arm.us, 0.5)
        gb_s, tflop_s = work_bytes / median / 1e3, flops / median / 1e6
        line = {
            "op": op,
            "arm": arm.name,
            "note": arm.note,
            **shape,
            "us": round(median, 2),
            "us_p20": round(quantile(arm.us, 0.2), 2),
            "us_p80": round(quantile(arm.us, 0.8), 2),
            "rounds": len(arm.us),
            "cuda_graph": arm.graph,
            "bytes": work_bytes,
            "flops": flops,
            "gb_s": round(gb_s, 1),
            "tflop_s": round(tflop_s, 2),
            "peak_gb_s": round(peaks.gb_s, 1),
            "peak_tflop_s": round(peaks.tflop_s, 2),
            "percent_of_bandwidth": round(100 * gb_s / peaks.gb_s, 1),
            "percent_of_compute": round(100 * tflop_s / peaks.tflop_s, 1),
            "floor_us": round(floor, 2),
            "times_floor": round(median / floor, 2),
            "relative_error": arm.error,
            **{key: by_arm.get(arm.name) for key, by_arm in (per_arm or {}).items()},
            **setting,
        }
        print(json.dumps(line), flush=True)
        error = "" if arm.error is None else f"  error {arm.error:.1e}"
        print(
            f"  {arm.name:24} {median:10.1f} us  ({line['us_p20']}-{line['us_p80']})"
            f"  {line['times_floor']:6.2f} x floor  {line['percent_of_bandwidth']:5.1f} % bw{error}"
            f"  {arm.note}",
            file=sys.stderr,
        )
