"""What the tests that plant bugs share."""

from collections.abc import Callable

import pytest
from emulated import ROOT, EmulationError, Plant
from op_cases import ForeignWriteError

_SEEDS = range(12)


def expect_report(error: Callable[[int], float], tolerance: float) -> None:
    """A wrong result, or the emulator's own report, with one of several seeds.

    Args:
        error: Of a planted kernel's result, with a seed.
    """
    for seed in _SEEDS:
        try:
            if not error(seed) < tolerance:
                return
        except (EmulationError, ForeignWriteError):
            return
    pytest.fail("the emulator did not notice")


def barrier_removals(file: str) -> list[Plant]:
    """The removal of each barrier of a kernel."""
    count = (ROOT / "csrc" / file).read_text().count("__syncthreads();")
    return [Plant(file, "__syncthreads();", "", which) for which in range(count)]
