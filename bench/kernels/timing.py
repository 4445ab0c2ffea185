"""Arms of a benchmark and their times: Triton's stopwatch on a GPU, torch's on a CPU.

An arm is one implementation. It is called on several sets of buffers in rotation, together larger
than the last-level cache, so that a call finds its weights and pools in memory, as it does between
two steps of a model. Arms take turns, so that clocks, temperature and other processes move all of
them alike. An arm that fails is left out and says why.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from dflare.processor import device_name

GRAPH_MS = 3  # of the device, for each of the ten replays that a turn on a GPU takes
CPU_SECONDS = 0.02  # of a turn on a CPU
LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
PACKAGES = ("torch", "triton", "sglang", "flashinfer-python", "sglang-kernel", "sglang-dflare")
# Largest relative error against float64, and times the error of plain PyTorch in the same type.
ACCURACY = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}
OVER_EAGER = 1.5


@dataclass
class Arm:
    """One implementation: `run(i)` calls it on buffer set i.

    Attributes:
        work: least bytes through memory and operations of what this arm does, if that means
            anything.
        note: what the time includes or leaves out, if it is not the whole operator.
        graph: whether a CUDA graph can hold it; else its time includes the launches.
        plan_us: host time of what it has to do once a step.
        us: times of a call, by turn. error: against float64. failure: why it has no times.
    """

    name: str
    run: Callable[[int], Any]
    work: tuple[float, float] | None = None
    note: str = ""
    graph: bool = True
    plan_us: float | None = None
    us: list[float] = field(default_factory=list)
    error: float | None = None
    failure: str = ""


@dataclass
class Case:
    """One operator at one shape.

    Attributes:
        shape: what lines say of it.
        makers: makes the arm of each name.
        check: gives arms their errors against float64, on the first buffer set.
        sets: number of buffer sets.
    """

    op: str
    shape: dict[str, Any]
    makers: dict[str, Callable[[], Arm]]
    check: Callable[[list[Arm]], None]
    sets: int


@contextlib.contextmanager
def kept_going(arm: Arm) -> Iterator[None]:
    """Turn an exception into the arm's failure.

    Raises:
        SystemExit: a kernel has left the device unusable: nothing after it could be measured.
    """
    try:
        yield
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        arm.failure = f"{type(error).__name__}: {said[0]}"
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                sys.exit(f"{arm.name}: {arm.failure}; the device is lost")


@contextlib.contextmanager
def asked_for(variable: str) -> Iterator[None]:
    """Asks the operators for a kernel that is taken only where an environment variable says so."""
    os.environ[variable] = "1"
    try:
        yield
    finally:
        del os.environ[variable]


def build(makers: dict[str, Callable[[], Arm]], names: Sequence[str]) -> list[Arm]:
    """The arms of these names; one that cannot be made is there too, with its failure."""
    arms = []
    for name in names:
        arm = Arm(name, lambda i: None)
        with kept_going(arm):
            arm = makers[name]()
        arms.append(arm)
    return arms


def times(run: Callable[[], object], device: str, graph: bool = True) -> list[float]:
    """Microseconds of `run`, several measurements."""
    if device == "cpu":
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        return [1e6 * t for t in timer.blocked_autorange(min_run_time=CPU_SECONDS).times]
    from triton import testing

    if graph:
        return [1e3 * t for t in testing.do_bench_cudagraph(run, rep=GRAPH_MS, return_mode="all")]
    return [1e3 * t for t in testing.do_bench(run, warmup=5, rep=10 * GRAPH_MS, return_mode="all")]


def take_turns(arms: list[Arm], sets: int, rounds: int, device: str) -> None:
    """Measure all arms in each round, beginning with another one each time."""

    def over_sets(arm: Arm) -> None:
        for i in range(sets):
            arm.run(i)

    for turn in range(rounds):
        for k in range(len(arms)):
            arm = arms[(turn + k) % len(arms)]
            if not arm.failure:
                with kept_going(arm):
                    taken = times(functools.partial(over_sets, arm), device, arm.graph)
                    arm.us += [us / sets for us in taken]


def buffer_sets(device: str, bytes_per_set: int) -> int:
    """How many buffer sets exceed the last-level cache three times, within half the free memory.

    One will do where it is over twenty times the cache: what of it a call finds there is then under
    5 % of what it reads.
    """
    if device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        free = torch.cuda.mem_get_info()[0]
    else:
        known = LAST_LEVEL_CACHE.exists()
        cache = int(LAST_LEVEL_CACHE.read_text().strip("K\n")) << 10 if known else 32 << 20
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = 1 if bytes_per_set > 20 * cache else max(2, -(-3 * cache // bytes_per_set))
    return max(1, min(wanted, 128, free // 2 // bytes_per_set))


@dataclass(frozen=True)
class Peaks:
    """What this device was measured to do: the better of reading and copying, and products."""

    gb_s: float
    tflop_s: float

    def floor_us(self, work: tuple[float, float]) -> float:
        """No implementation can be faster than this."""
        return max(work[0] / self.gb_s / 1e3, work[1] / self.tflop_s / 1e6)


def measure_peaks(device: str, dtype: torch.dtype) -> Peaks:
    """The best of reductions and a copy over GBs, and of a large product of random numbers.

    Reductions read alone, as attention does; zeros would draw less power. On a CPU oneDNN is tried
    too: MKL, which PyTorch takes for float32, may reach half of it.
    """
    elements, size = (2**29, 8192) if device == "cuda" else (2**25, 1024)
    source, target = torch.randn(elements, device=device), torch.empty(elements, device=device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    read = min(min(times(run, device, False)) for run in (source.sum, source.amax))
    copy = min(times(lambda: target.copy_(source), device, False))
    product = min(times(lambda: a @ b, device, False))
    if device == "cpu":
        blocked = a.to_mkldnn(), b.to_mkldnn()
        product = min(product, *times(lambda: torch.nn.functional.linear(*blocked), device))
    moved = source.numel() * source.element_size()
    return Peaks(max(moved / read, 2 * moved / copy) / 1e3, 2 * size**3 / product / 1e6)


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest |got - expected| / |expected| of the tensors; NaN where one of them has a NaN."""
    pairs = zip(got, expected, strict=True)
    errors = [((g.double() - e).norm() / e.norm()).item() for g, e in pairs]
    return max(errors) if all(error == error for error in errors) else float("nan")


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions and command, which a number needs beside it."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    found = {
        "hardware": device_name(cuda=device == "cuda"),
        "versions": versions,
        "revision": output_of("git", "rev-parse", "--short", "HEAD") or "unknown",
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        query = "driver_version,clocks.sm,clocks.mem,power.limit"
        found["gpu"] = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    else:
        found["isa"] = torch.ops.dflare.cpu_isa()
    return found


def output_of(*command: str) -> str:
    """What a program prints; nothing if it is not installed or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
