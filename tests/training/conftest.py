"""Tiny tensors are fastest on one thread, and one thread gives the same bits every time."""

import pytest
import torch
from tiny_models import write_data


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    """With data for a tiny target."""
    write_data(tmp_path / "data.xz", 14)
    return tmp_path
