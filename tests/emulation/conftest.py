from pathlib import Path

import emulated
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if emulated.MISSING and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=emulated.MISSING))
