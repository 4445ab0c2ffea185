"""What a device is and can do: measured peaks, cache and memory sizes, versions."""

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dflare.processor import processor_name

LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
PACKAGES = ("torch", "triton", "sglang", "flashinfer-python", "sglang-kernel", "sgl-kernel")


@dataclass(frozen=True)
class Peaks:
    """What this device was measured to do, decimal units."""

    read_gb_s: float
    copy_gb_s: float  # bytes read and written
    tflop_s: float

    @property
    def gb_s(self) -> float:
        """The better of the two, so that no operator is held against less than memory gives."""
        return max(self.read_gb_s, self.copy_gb_s)

    def floor_us(self, work_bytes: float, flops: float) -> float:
        return max(work_bytes / self.gb_s / 1e3, flops / self.tflop_s / 1e6)


def measure_peaks(device: str, dtype: torch.dtype) -> Peaks:
    """The best of several calls each: reductions and a copy over GBs, a large matrix product.

    Reductions read alone, as attention does; memory gives them more than it gives a copy, which
    keeps changing direction. The product is of random numbers: zeros draw less power. On a CPU it
    is tried with oneDNN too: MKL, which PyTorch takes for float32, may reach half of it.
    """
    elements, size = (2**29, 8192) if device == "cuda" else (2**25, 1024)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    read = source.numel() * source.element_size()
    least = functools.partial(least_seconds, device)
    product = least(lambda: a @ b)
    if device == "cpu":
        blocked = a.to_mkldnn(), b.to_mkldnn()
        product = min(product, least(lambda: torch.nn.functional.linear(*blocked)))
    return Peaks(
        read_gb_s=read / min(least(source.sum), least(source.amax)) / 1e9,
        copy_gb_s=2 * read / least(lambda: target.copy_(source)) / 1e9,
        tflop_s=2 * size**3 / product / 1e12,
    )


def least_seconds(device: str, run: Callable[[], object], calls: int = 12) -> float:
    """Of a call; on a GPU between two of its events, behind a kernel that spins.

    The spinning keeps the stream busy while the host queues the call, so that its launch is not
    part of the time.
    """
    run()
    seconds = []
    for _ in range(calls):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(500_000)
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def sets_needed(bytes_per_set: int, cache: int, free: int) -> int:
    """Buffer sets that together exceed three times the last-level cache, within half of `free`.

    One will do where it is over twenty times the cache: what of it a call finds there is then under
    5 % of what it reads.
    """
    wanted = 1 if bytes_per_set > 20 * cache else max(2, -(-3 * cache // bytes_per_set))
    return max(1, min(wanted, 128, free // 2 // bytes_per_set))


def buffer_sets(device: str, bytes_per_set: int) -> int:
    """`sets_needed` on this machine."""
    if device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return sets_needed(bytes_per_set, cache, torch.cuda.mem_get_info()[0])
    known = LAST_LEVEL_CACHE.exists()
    cache = int(LAST_LEVEL_CACHE.read_text().strip().removesuffix("K")) << 10 if known else 32 << 20
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sets_needed(bytes_per_set, cache, free)


def output_of(*command: str) -> str:
    """What the command prints; nothing if it is not installed or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions that a number needs beside it."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    info: dict[str, Any] = {"versions": found, "python": platform.python_version()}
    info["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    info["command"] = " ".join(["python", *sys.argv])
    info["revision"] = output_of("git", "rev-parse", "--short", "HEAD") or "unknown"
    if device == "cpu":
        return info | {"cpu": processor_name(), "threads": torch.get_num_threads()}
    # From nvidia-smi: asking torch for the name would take a context's memory from other processes.
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    smi = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    fields = [value.strip() for value in smi.partition("\n")[0].split(",")]
    columns = ("gpu", "driver", "sm_clock", "memory_clock", "power_limit")
    if len(fields) != len(columns):
        fields = [torch.cuda.get_device_name(0), *["unknown"] * 4]
    return info | dict(zip(columns, fields, strict=True)) | {"cuda": torch.version.cuda}
