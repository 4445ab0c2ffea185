"""Memory has a size: what is allocated is missing from what is free, and an end."""

from collections.abc import Iterator

import pytest
import torch

import cuda_device

MB = 1 << 20
SIZE = 4096 * MB


@pytest.fixture(autouse=True)
def four_gigabytes() -> Iterator[None]:
    torch.cuda.empty_cache()
    cuda_device.load().set_memory_size(SIZE)
    yield
    torch.cuda.empty_cache()
    cuda_device.load().set_memory_size(16384 * MB)


def free() -> int:
    return torch.cuda.mem_get_info()[0]


def test_free_memory_follows_allocations() -> None:
    before = free()
    assert torch.cuda.mem_get_info()[1] == SIZE
    x = torch.empty(600 * MB, dtype=torch.uint8, device="cuda")
    assert before - free() == 600 * MB
    del x
    assert before - free() == 600 * MB  # the caching allocator keeps it
    torch.cuda.empty_cache()
    assert free() == before


def test_a_graph_keeps_its_pool() -> None:
    x = torch.zeros(100 * MB, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    before = free()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
    torch.cuda.empty_cache()
    assert before - free() >= 100 * MB
    del y
    torch.cuda.empty_cache()
    assert before - free() >= 100 * MB  # replays write there
    del graph
    torch.cuda.empty_cache()
    assert free() == before


def test_beyond_a_limit_memory_is_counted_and_not_touched() -> None:
    device, small = cuda_device.load(), torch.ones(4, device="cuda")  # the segment of small ones
    before = free()
    device.set_work_limit(64 * 1024)
    try:
        x = torch.ones(1000 * MB, dtype=torch.uint8, device="cuda")
        y = torch.cat([x, x])
        small = small + 1
    finally:
        device.set_work_limit((1 << 64) - 1)
    assert before - free() == 3000 * MB and y.shape == (2000 * MB,)
    assert not x[:100].any() and not y[-100:].any()
    assert small.tolist() == [2.0] * 4


def test_the_end_of_memory_is_reported_as_on_a_gpu() -> None:
    held = torch.empty(3000 * MB, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"total capacity of 4\.00 GiB"):
        torch.empty(1000 * MB, dtype=torch.uint8, device="cuda")
    del held  # the cache gives it back where it is needed
    assert torch.empty(3200 * MB, dtype=torch.uint8, device="cuda").numel() == 3200 * MB
