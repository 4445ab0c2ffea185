"""A CUDA device for tests, without a GPU: see README.md beside this file."""

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_module: Any = None


def load() -> Any:
    """Gives this process the device; call it before torch is imported.

    Returns:
        The extension module that steers the device (README.md lists its functions).

    Raises:
        RuntimeError: torch is already there with another CUDA runtime, or the build failed.
    """
    global _module
    if _module is not None:
        return _module
    if "torch" in sys.modules:
        raise RuntimeError(
            "torch was imported before cuda_device.load(): it holds the real CUDA runtime. "
            "Load the device first, in a process of its own"
        )
    # Nothing can be compiled for the device; Triton kernels run interpreted.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from .build import MODULE, build

    libraries = build()
    ctypes.CDLL(str(libraries.runtime), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(libraries.driver), ctypes.RTLD_GLOBAL)
    import torch

    sys.path.insert(0, str(libraries.module_folder))
    _module = __import__(MODULE)
    sys.path.remove(str(libraries.module_folder))
    _module.override_all()
    _module.follow_allocations()
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    torch.cuda._is_in_bad_fork = lambda: False  # the device survives a fork
    return _module


@contextmanager
def lazy(seed: int) -> Iterator[None]:
    """Inside, work waits for the host and then runs in a legal order that the seed draws."""
    device = load()
    device.set_lazy(True, seed)
    try:
        yield
    finally:
        device.set_lazy(False)


@contextmanager
def no_races() -> Iterator[None]:
    """Fails if two accesses inside are not ordered by streams, events, graphs or host waits.

    Raises:
        AssertionError: the accesses and their call sites.
    """
    device = load()
    device.watch_races(True)
    try:
        yield
    finally:
        device.watch_races(False)
    if reports := device.races():
        raise AssertionError("\n".join(reports))


@contextmanager
def count_waits() -> Iterator[Counter[tuple[str, str]]]:
    """Counts the host's waits for the device by (operation, call site)."""
    waits: Counter[tuple[str, str]] = Counter()

    def count(operation: str, site: str) -> None:
        waits[operation, site] += 1

    device = load()
    device.set_wait_callback(count)
    try:
        yield waits
    finally:
        device.set_wait_callback(None)
