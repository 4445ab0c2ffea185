"""The table of stand-ins: what answers for a compiled kernel, by the kernel's full name.

A stand-in is a function of CPU tensors that share the memory of the launch's arguments. It runs
when the stream gets to it, and again at every replay of a graph that holds the launch. Reading an
argument that is not there yet, or no longer, therefore gives what a kernel would have got.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from device import DEVICE


@dataclass(frozen=True)
class StandIn:
    """Attributes: `run`, the function; `writes`, names of the parameters that it writes."""

    run: Callable[..., None]
    writes: frozenset[str]


TABLE: dict[str, StandIn] = {}
launches: Counter[str] = Counter()


def stand_in(name: str, writes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the stand-in of a kernel.

    Args:
        name: Library and operator, such as `sgl_kernel::rmsnorm`.
        writes: Names of the parameters that it writes, separated by spaces.
    """

    def register(run: Callable[..., None]) -> Callable[..., None]:
        unknown = set(writes.split()) - set(inspect.signature(run).parameters)
        assert not unknown, f"{name}: no parameters {sorted(unknown)}"
        assert name not in TABLE, f"{name} has a stand-in already"
        TABLE[name] = StandIn(run, frozenset(writes.split()))
        return run

    return register


def launch(name: str, *args: Any) -> None:
    """Put a stand-in on the current stream.

    Raises:
        NotImplementedError: the kernel has none.
    """
    if name not in TABLE:
        refuse(name)
    kernel = TABLE[name]
    launches[name] += 1
    reads, writes = [], []
    for parameter, arg in zip(inspect.signature(kernel.run).parameters, args, strict=False):
        if isinstance(arg, torch.Tensor):
            (writes if parameter in kernel.writes else reads).append(arg)
    host = [DEVICE.alias(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]

    def run() -> None:
        with torch.inference_mode():
            kernel.run(*host)

    DEVICE.enqueue(name, run, reads=reads, writes=writes)


def refuse(name: str) -> NoReturn:
    """Say which kernel has no stand-in."""
    raise NotImplementedError(
        f"the CUDA device for tests has no stand-in for the kernel {name}; add one to "
        "tests/cuda_path/stand_ins"
    )
