"""Weights and K/V of the CPU platform lie in memory that is there before the first request."""

from pathlib import Path

import pytest
import torch

from dflare.cpu.memory import huge_zeros, move_to_huge_pages


def mapping_of(address: int) -> dict[str, int]:
    """Sizes in KiB of the mapping that holds an address, as Linux tells them."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and rest[-1] == "kB":
            found[first.rstrip(":")] = int(rest[0])
    return found


def test_every_page_is_there_and_huge_where_the_system_has_them():
    zeros = huge_zeros((8, 1 << 20), torch.bfloat16)
    assert zeros.shape == (8, 1 << 20) and not zeros.any()
    mapping = mapping_of(zeros.data_ptr())
    assert mapping["Rss"] >= zeros.nbytes >> 10
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("this system has no huge pages")
    assert mapping["AnonHugePages"] >= zeros.nbytes >> 11, "most of it, whatever its ends"


def test_weights_keep_their_values_and_their_ties():
    large, small = torch.nn.Linear(1024, 2048), torch.nn.Linear(4, 4)
    tied = torch.nn.Linear(1024, 2048, bias=False)
    tied.weight = large.weight
    model = torch.nn.ModuleList([large, small, tied])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = large.weight.data_ptr(), small.weight.data_ptr()
    move_to_huge_pages(model)
    assert large.weight.data_ptr() != places[0] and small.weight.data_ptr() == places[1]
    assert tied.weight is large.weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
