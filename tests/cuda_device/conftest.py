"""The tests of this folder run on the test device."""

from pathlib import Path

import pytest

from cuda_device.pytest_plugin import run_elsewhere


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    return run_elsewhere(item, nextitem, Path(__file__).parent) or None
