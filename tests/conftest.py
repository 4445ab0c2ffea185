"""Puts this folder on the import path, so that `checkpoints` can be imported; parts runs in two."""

import os
from pathlib import Path

import pytest

# PyTorch's batched product stands in for a GPU's behind the emulator. With AMX oneDNN's lets NaN of
# one row into others if the depth is no multiple of 32, and rows that do not count are NaN there.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# What shares what takes long to start, or compiles the same sources, runs in one process; the
# longest first, so that the two of `make test` end together. Any other file is a group of its own.
_SERVERS = ("test_server.py", "test_server_api.py", "test_server_end.py", "test_swap.py")
_LONGEST_FIRST = ("engine", "device", "servers", "emulator")
_TOGETHER = {
    **{f"engine/{name}": "servers" for name in _SERVERS},
    "engine": "engine",
    "cuda_path": "device",
    "cuda_device": "device",
    "ops": "emulator",
    "emulation": "emulator",
    "kernels": "emulator",
}


def _group(item: pytest.Item) -> str:
    path = item.path.relative_to(Path(__file__).parent)
    return _TOGETHER.get(path.as_posix()) or _TOGETHER.get(path.parts[0]) or path.as_posix()


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup`, as `make test` has it, one process runs a group whole."""
    if not hasattr(config, "workerinput"):
        return
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    order = {name: place for place, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(_group(item), len(order)))
