"""The append kernels, run by the emulator, against float64."""

import pytest
import torch
from emulated_ops import append_error
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import AppendCase

from dflare.ops import append_context_kv_reference

# Of a whole head, by element type: one rounding of the fused state, one of the result.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(case: AppendCase, seed: int = 0) -> None:
    for fused in (True, False):
        assert append_error(case, seed, fused=fused) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    "case",
    [
        AppendCase(),
        AppendCase(commit_lens=(3,)),
        AppendCase(commit_lens=(0, 0)),
        AppendCase(commit_lens=(0, 16, 5), layers=5, kv_heads=2, hidden=192, bias=True),
        AppendCase(rows=1, rotary=64),
        AppendCase(rows=70, hidden=72),
        AppendCase(rows=9, taps=16, layers=12, hidden=64),
    ],
    ids=str,
)
def test_writes_the_context_of_every_valid_row_and_nothing_else(case: AppendCase) -> None:
    check(case)


@pytest.mark.parametrize("hidden", [2560, 2880, 4096, 5120, 8192])
def test_hidden_sizes_of_published_targets(hidden: int) -> None:
    check(AppendCase(rows=2, hidden=hidden, layers=1, taps=2))


@pytest.mark.parametrize("fused", [True, False], ids=["fused projection", "GEMM"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_not_less_accurate_than_pytorch(dtype: torch.dtype, fused: bool) -> None:
    """At most 1.5 times the error of the op's plain PyTorch reference in the same type."""
    case = AppendCase(commit_lens=(3, 0, 16), taps=9, hidden=576, kv_heads=2, dtype=dtype)
    x = case.inputs()
    append_context_kv_reference(*case.arguments(x))
    assert append_error(case, fused=fused) <= 1.5 * case.error(x["k_pools"], x["v_pools"])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_shape_under_any_thread_schedule(
    dtype: torch.dtype, head_dim: int, data: st.DataObject
) -> None:
    draw = data.draw
    block = draw(st.integers(2, 32))
    commit_lens = draw(
        st.none() | st.lists(st.integers(0, block), min_size=1, max_size=6).map(tuple)
    )
    case = AppendCase(
        commit_lens=commit_lens,
        rows=draw(st.sampled_from([1, 15, 16, 17, 63, 64, 65, 130, 200])),
        block=block,
        taps=draw(st.integers(1, 16)),
        layers=draw(st.integers(1, 6)),
        hidden=8 * draw(st.integers(1, 48)),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=head_dim,
        rotary=draw(st.sampled_from([head_dim // 4, head_dim // 2, head_dim])),
        bias=draw(st.booleans()),
        dtype=dtype,
        seed=draw(st.integers(0, 2**20)),
    )
    check(case, seed=draw(st.integers(0, 2**20)))
