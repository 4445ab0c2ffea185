"""Timing of kernel benchmarks: arms that take turns, cold caches, CUDA graphs.

An arm is one implementation. It is called on several sets of buffers in rotation, together larger
than the L2 cache, so that a call finds its weights and pools in memory, as it does between two
steps of a model. On a GPU one CUDA graph per arm runs all its sets; arms alternate within a round,
so that clocks and temperature move all of them alike. An arm that fails is left out and says why.
"""

import contextlib
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

REPLAY_US = 1000.0  # a replay is to take at least this long
MOST_PASSES = 20  # over the sets, in one graph


@dataclass
class Arm:
    """One implementation: `run(i)` calls it on buffer set i.

    work: least bytes and operations of what this arm does; None where no such number means
    anything. capturable: False for one that waits for the device, which no graph can hold; its time
    then includes the launches.
    """

    name: str
    run: Callable[[int], object]
    work: tuple[float, float] | None = None
    note: str = ""  # what the time includes or leaves out, if it is not the whole operator
    capturable: bool = True
    plan_us: float | None = None  # host time of what it has to do once a step
    us: list[float] = field(default_factory=list)
    graph: bool = False
    error: float | None = None
    failure: str = ""


class DeviceLostError(RuntimeError):
    """A kernel has left the device unusable for this process."""


@contextlib.contextmanager
def kept_going(arm: Arm) -> Iterator[None]:
    """Turns an exception into the arm's failure, on stderr too.

    Raises:
        DeviceLostError: after it not even waiting for the device works.
    """
    try:
        yield
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        arm.failure = f"{type(error).__name__}: {said[0]}"
        print(f"{arm.name} left out: {arm.failure}", file=sys.stderr, flush=True)
    if arm.failure and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(f"after {arm.name}: {arm.failure}") from error


def free_memory() -> None:
    """What arms or shapes that are gone held goes back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def build(makers: dict[str, Callable[[], Arm]], names: Sequence[str]) -> list[Arm]:
    """The arms of these names; one that cannot be made is there too, with its failure."""
    arms = []
    for name in names:
        arm = Arm(name, lambda i: None)
        with kept_going(arm):
            arm = makers[name]()
        arms.append(arm)
    return arms


@dataclass
class Replay:
    """What is timed at once: `calls` calls, behind a kernel that spins for `spin_us` (0: none)."""

    run: Callable[[], object]
    calls: int
    spin_us: float = 0.0


def passes_for(pass_us: float) -> int:
    """How often a graph goes over the sets, so that what it costs to start it weighs nothing."""
    return max(1, min(MOST_PASSES, -int(-REPLAY_US // max(pass_us, 1.0))))


@functools.cache
def cycles_per_us() -> float:
    """Of `torch.cuda._sleep`."""
    cycles = 2_000_000
    torch.cuda._sleep(cycles)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (begin.elapsed_time(end) * 1e3)


def time_replay(replay: Replay) -> float:
    """Microseconds of the device for one replay.

    The stream spins while the host queues both events and the graph, so that the first event passes
    when all of it has been queued. Where the host was too slow for that, it is tried again with
    longer spinning.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(4):
        if replay.spin_us:
            torch.cuda._sleep(int(replay.spin_us * cycles_per_us()))
        begin.record()
        replay.run()
        end.record()
        in_time = not begin.query()
        end.synchronize()
        if in_time or not replay.spin_us:
            break
        replay.spin_us *= 2
    return begin.elapsed_time(end) * 1e3


def capture(run: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    """The calls as a graph in a memory pool that other arms' graphs may share.

    Sharing is safe because arms never run at the same time and nobody reads what a replay leaves.
    Where capturing fails, torch leaves its stream current and its allocator in the pool
    (CUDAGraph.capture_end raises before it gets to either), and nothing could be captured or freed
    any more: both are put right here.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except Exception:
        torch.cuda.set_stream(stream)
        device = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:  # it had ended: a call failed, the capture did not
            graph.reset()
        else:
            torch._C._cuda_releasePool(device, pool)
            _failed_captures.append(graph)  # the allocator's callbacks point at it
        raise
    return graph


_failed_captures: list[torch.cuda.CUDAGraph] = []


def prepare(arm: Arm, sets: int, pool: Any) -> Replay:
    """Warms the arm up and makes what is timed: a graph of several passes, or plain calls."""

    def go(passes: int) -> None:
        for _ in range(passes):
            for i in range(sets):
                arm.run(i)

    go(1)  # module load, workspaces, autotuning
    torch.cuda.synchronize()
    if not arm.capturable:
        return Replay(lambda: go(1), sets)
    passes = passes_for(time_replay(Replay(lambda: go(1), sets)))
    graph = capture(lambda: go(passes), pool)
    arm.graph = True
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    graph.replay()
    host_us = (time.perf_counter() - start) * 1e6
    torch.cuda.synchronize()
    return Replay(graph.replay, passes * sets, spin_us=50 + 2 * host_us)


def time_on_gpu(arms: list[Arm], sets: int, rounds: int) -> None:
    pool = torch.cuda.graph_pool_handle()
    ready: list[tuple[Arm, Replay]] = []
    for arm in arms:
        if not arm.failure:
            with kept_going(arm):
                ready.append((arm, prepare(arm, sets, pool)))
        if arm.failure:
            free_memory()
            pool = torch.cuda.graph_pool_handle()
    for turn in range(rounds):
        for k in range(len(ready)):
            arm, replay = ready[(turn + k) % len(ready)]
            if not arm.failure:
                with kept_going(arm):
                    arm.us.append(time_replay(replay) / replay.calls)


def time_on_cpu(arms: list[Arm], sets: int, rounds: int) -> None:
    for turn in range(-1, rounds):  # the first is to warm up
        for k in range(len(arms)):
            arm = arms[(turn + k) % len(arms)]
            if arm.failure:
                continue
            with kept_going(arm):
                start = time.perf_counter()
                for i in range(sets):
                    arm.run(i)
                taken = (time.perf_counter() - start) * 1e6 / sets
                if turn >= 0:
                    arm.us.append(taken)


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest |got - expected| / |expected| of the tensors; NaN where one of them has a NaN."""
    errors = [
        ((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("nan")


def profile(arm: Arm) -> None:
    """One call between profiler marks, for `ncu --profile-from-start off`."""
    arm.run(0)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    arm.run(0)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
