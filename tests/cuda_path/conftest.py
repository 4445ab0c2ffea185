"""Pairs and schedulers that the tests of the CUDA path share."""

import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "engine")]

import scheduler_process  # noqa: E402
from models import GRAMMAR, write_pair  # noqa: E402
from reference_drafter import ReferencePair  # noqa: E402
from scheduler_process import Scheduler, running_scheduler  # noqa: E402

# Every change of width in the middle of requests, the block (4) the most often.
TURNS = [3, 1, 4, 2, 1, 1, 4, 4]


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def reference(pair) -> ReferencePair:
    return ReferencePair(*pair)


@pytest.fixture(scope="session")
def alone(pair):
    """The target without speculation, without overlap: SGLang penalises a token late with it."""
    with running_scheduler(
        pair[0], disable_overlap_schedule=True, page_size=1, **GRAMMAR
    ) as scheduler:
        yield scheduler


@pytest.fixture(scope="session")
def dflare(pair) -> Scheduler:
    """DFLARE as a server on Hopper runs it, with scripted widths, chunks and mixed batches."""
    with running_scheduler(
        *pair,
        widths=TURNS,
        chunked_prefill_size=64,
        enable_mixed_chunk=True,
        **GRAMMAR,
    ) as scheduler:
        yield scheduler


def pytest_sessionfinish() -> None:
    scheduler_process.close_zygote()


def pytest_terminal_summary(terminalreporter) -> None:
    """What the device did in all schedulers, and where the host waited for it."""
    lines = scheduler_process.summary()
    if lines:
        terminalreporter.section("CUDA device")
        for line in lines:
            terminalreporter.write_line(line)
