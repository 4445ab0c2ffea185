"""Puts this folder on the import path, so that `checkpoints` can be imported; parts runs in two."""

from pathlib import Path

import pytest

# Folders whose tests share what takes long to start, or compile the same sources.
_TOGETHER = {
    "engine": "engine",
    "cuda_path": "device",
    "cuda_device": "device",
    "ops": "emulator",
    "emulation": "emulator",
    "kernels": "emulator",
}


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup`, as `make test` has it, one process runs a group whole."""
    if config.pluginmanager.hasplugin("xdist"):
        here = Path(__file__).parent
        for item in items:
            folder = item.path.relative_to(here).parts[0]
            item.add_marker(pytest.mark.xdist_group(_TOGETHER.get(folder, "rest")))
