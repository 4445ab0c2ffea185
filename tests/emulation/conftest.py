"""The emulator needs g++ on x86-64; its tests share the float64 reference of tests/kernels."""

import platform
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = None
    if platform.machine() not in ("x86_64", "AMD64"):
        missing = "the emulator runs on x86-64 only"
    elif shutil.which("g++") is None:
        missing = "g++ is not on the PATH"
    if missing:
        here = str(Path(__file__).parent)
        for item in items:
            if str(item.path).startswith(here):
                item.add_marker(pytest.mark.skip(reason=missing))
