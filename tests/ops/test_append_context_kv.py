from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import AppendCase
from op_devices import (
    APPEND_TOLERANCE,
    BF16,
    CUDA,
    DEVICES,
    DTYPES,
    DTYPES_AND_SIZES,
    F16,
    F32,
    GEMM,
    KERNELS,
    append_error,
    threads,
)

from dflare import ops


def check(device: str, case: AppendCase, seed: int = 0) -> None:
    """On the emulator by way of a GEMM too, however few rows there are."""
    tolerance = APPEND_TOLERANCE[case.dtype]
    assert append_error(device, case, seed) < tolerance
    if device == "emulated":
        assert append_error(device, case, seed, plants=(GEMM,)) < tolerance


@DEVICES
@pytest.mark.parametrize(
    "case",
    [
        AppendCase(),
        AppendCase(commit_lens=(3,)),
        AppendCase(commit_lens=(0, 0)),
        AppendCase(rows=0),
        AppendCase(commit_lens=(0, 16, 5), layers=5, kv_heads=2, hidden=192, bias=True),
        AppendCase(rows=1, rotary=64),
        AppendCase(rows=70, hidden=72),
        AppendCase(rows=9, taps=16, layers=12, hidden=64),
        AppendCase(rows=2060, hidden=16, taps=1, layers=1),  # two panels
        AppendCase(commit_lens=(1, 0, 2) * 46, hidden=16, layers=1, taps=1),  # panels of blocks
    ],
    ids=str,
)
def test_writes_the_context_of_every_valid_row_and_nothing_else(device, case):
    check(device, case)


@KERNELS
@pytest.mark.parametrize("hidden", [2560, 2880, 4096, 5120, 8192])
def test_hidden_sizes_of_published_targets(device, hidden):
    check(device, AppendCase(rows=2, hidden=hidden, layers=1, taps=2))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(
    "case",
    [
        AppendCase(rows=70, head_dim=256, rotary=64),
        AppendCase(commit_lens=(3, 0, 16, 9), kv_heads=8, hidden=2560, taps=9, layers=7),
        AppendCase(commit_lens=(7,) * 40, block=16, kv_heads=2, hidden=512),
        AppendCase(commit_lens=(5, 31) * 20, block=32, kv_heads=1, hidden=512),  # GEMM path
        AppendCase(rows=1, head_dim=64, rotary=64, hidden=2880, kv_heads=8),
        AppendCase(rows=100, head_dim=256, rotary=128, hidden=1152, bias=True),
        AppendCase(rows=300, hidden=4096, taps=16, layers=12, kv_heads=8),
        AppendCase(rows=2500, hidden=512),  # two panels
    ],
    ids=str,
)
def test_writes_the_context_of_published_drafters(device, case, dtype):
    check(device, replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "case",
    [
        *(AppendCase(rows=r, hidden=576, taps=7, layers=3, kv_heads=3) for r in (1, 6, 7, 401)),
        *(AppendCase(rows=13, hidden=h, layers=5, bias=True) for h in (1, 15, 33, 47, 100)),
        AppendCase(rows=30, hidden=2880, layers=1, taps=2),  # weights larger than a cache block
        AppendCase(rows=1700, hidden=32),  # a prompt longer than the scratch
    ],
    ids=str,
)
def test_a_cpu_takes_any_hidden_size(case, dtype):
    check("cpu", replace(case, dtype=dtype, head_dim=64, rotary=64))


@DEVICES
@pytest.mark.parametrize("narrow", [0, 1])
def test_is_not_less_accurate_than_pytorch(device, narrow):
    """At most 1.5 times the error of the op's plain PyTorch reference in the same type."""
    dtype = DTYPES[device][narrow]
    case = AppendCase(commit_lens=(3, 0, 16), taps=9, hidden=576, kv_heads=2, dtype=dtype)
    x = case.inputs()
    case.call(ops.append_context_kv_reference, x)
    allowed = 1.5 * case.error(x["k_pools"], x["v_pools"])
    for plants in ((), (GEMM,)) if device == "emulated" else ((),):
        assert append_error(device, case, plants=plants) <= allowed


@DTYPES_AND_SIZES
@settings(max_examples=16, deadline=None)
@given(data=st.data())
def test_any_shape(device, dtype, head_dims, data):
    """On the emulator under any thread schedule."""
    draw, cpu = data.draw, device == "cpu"
    block = draw(st.integers(1 if cpu else 2, 32))
    commit_lens = draw(
        st.none() | st.lists(st.integers(0, block), min_size=1, max_size=6).map(tuple)
    )
    head_dim = draw(st.sampled_from(head_dims))
    case = AppendCase(
        commit_lens=commit_lens,
        rows=draw(st.sampled_from([1, 15, 16, 17, 63, 64, 65, 130, 200])),
        block=block,
        taps=draw(st.integers(1, 16)),
        layers=draw(st.integers(1, 6)),
        # With fewer channels, taps that cancel out make the norm ill-conditioned.
        hidden=draw(st.integers(8, 384)) if cpu else 8 * draw(st.integers(1, 48)),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=head_dim,
        rotary=draw(st.sampled_from([head_dim // 4, head_dim // 2, head_dim, *([0, 2] * cpu)])),
        bias=draw(st.booleans()),
        dtype=dtype,
        seed=draw(st.integers(0, 2**20)),
    )
    check(device, case, seed=draw(st.integers(0, 2**20)))


@pytest.mark.parametrize("rows", [1, 8, 100])
def test_result_does_not_depend_on_the_number_of_threads(rows):
    case, outcomes = AppendCase(rows=rows, dtype=F32), []
    for count in (1, 2, 3):
        x = case.inputs()
        with threads(count):
            case.call(ops.append_context_kv, x)
        outcomes.append(torch.stack((x["k_pools"], x["v_pools"])))
    assert torch.equal(outcomes[0], outcomes[1]) and torch.equal(outcomes[0], outcomes[2])


@pytest.mark.parametrize("device", [CUDA])
def test_a_graph_follows_the_committed_lengths_of_each_replay(device):
    cases = [AppendCase(commit_lens=lens) for lens in ((3, 16, 0), (0, 0, 0), (16, 16, 16))]
    inputs = [{name: x.cuda() for name, x in case.inputs().items()} for case in cases]
    static = {name: tensor.clone() for name, tensor in inputs[-1].items()}
    cases[-1].call(ops.append_context_kv, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cases[-1].call(ops.append_context_kv, static)
    for case, x in zip(cases, inputs, strict=True):
        for name, tensor in x.items():
            static[name].copy_(tensor)
        graph.replay()
        pools = static["k_pools"].cpu(), static["v_pools"].cpu()
        assert case.error(*pools) < APPEND_TOLERANCE[case.dtype]


def test_memory_between_the_slots_of_a_strided_pool_is_untouched():
    case = AppendCase(dtype=F32)
    x = case.inputs()
    between = x["k_pools"]._base[:, :, -1]
    before = between.clone()
    case.call(ops.append_context_kv, x)
    assert torch.equal(between, before)
