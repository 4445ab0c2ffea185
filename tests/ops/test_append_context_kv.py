import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import append_case, assert_accurate, copied

from dflare.ops import append_context_kv, append_context_kv_reference

DTYPES = [torch.float32, torch.bfloat16]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_equals_the_reference_for_any_shape(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    head_dim = data.draw(st.sampled_from([16, 32, 48, 64, 80, 128, 256]))
    block_size = data.draw(st.integers(1, 32))
    commit_lens = data.draw(
        st.none() | st.lists(st.integers(0, block_size), min_size=1, max_size=5)
    )
    case = append_case(
        data.draw(st.integers(0, 1 << 20)),
        dtype=dtype,
        layers=data.draw(st.integers(1, 12)),
        taps=data.draw(st.integers(1, 16)),
        hidden=data.draw(st.integers(1, 200)),
        kv_heads=data.draw(st.integers(1, 4)),
        head_dim=head_dim,
        rotary=data.draw(st.sampled_from([0, 2, 8, 16, head_dim // 2, head_dim])),
        rows=data.draw(st.integers(1, 40)),
        commit_lens=commit_lens,
        block_size=block_size,
        bias=data.draw(st.booleans()),
    )
    assert_accurate(append_context_kv, append_context_kv_reference, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 7, 64, 401])
def test_equals_the_reference_at_the_demo_drafters_shapes(rows, dtype):
    case = append_case(rows, dtype=dtype, rows=rows)
    assert_accurate(
        append_context_kv, append_context_kv_reference, case, dtype, compare_to_eager=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 15, 33, 47, 100])
def test_equals_the_reference_for_odd_hidden_sizes(hidden, dtype):
    case = append_case(hidden, dtype=dtype, layers=5, taps=3, hidden=hidden, rows=13, bias=True)
    assert_accurate(append_context_kv, append_context_kv_reference, case, dtype)


def test_weights_larger_than_the_cache_block_are_projected_completely():
    case = append_case(0, layers=1, taps=2, hidden=2880, kv_heads=1, head_dim=128, rows=30)
    assert_accurate(append_context_kv, append_context_kv_reference, case, torch.float32)


def test_a_prompt_longer_than_the_scratch_is_projected_completely():
    case = append_case(0, layers=2, taps=2, hidden=32, kv_heads=1, head_dim=16, rows=1700)
    assert_accurate(append_context_kv, append_context_kv_reference, case, torch.float32)


def test_only_committed_rows_are_written():
    case = append_case(1, commit_lens=[3, 0, 8, 1], block_size=8)
    before = copied(case)
    append_context_kv(**case)
    committed = [0, 1, 2, *range(16, 24), 24]
    written = torch.zeros(case["k_pools"][0].shape[0], dtype=torch.bool)
    written[case["cache_loc"][committed]] = True
    for name in ("k_pools", "v_pools"):
        for old, new in zip(before[name], case[name], strict=True):
            assert torch.equal(old[~written], new[~written])
            assert (old[written] != new[written]).any(dim=-1).all()
            assert new.isfinite().all()


def test_memory_between_the_slots_of_a_strided_pool_is_untouched():
    case = append_case(2)
    wide = [
        torch.as_strided(pool, (pool.shape[0], pool.shape[1] + 1, pool.shape[2]), pool.stride())
        for pool in case["k_pools"]
    ]
    before = [pool[:, -1].clone() for pool in wide]
    append_context_kv(**case)
    assert all(torch.equal(old, pool[:, -1]) for old, pool in zip(before, wide, strict=True))


def test_no_rows_and_no_committed_rows_write_nothing():
    for case in (append_case(3, rows=0), append_case(3, commit_lens=[0, 0], block_size=4)):
        before = copied(case)
        append_context_kv(**case)
        for name in ("k_pools", "v_pools"):
            assert all(map(torch.equal, before[name], case[name]))


@pytest.mark.parametrize("rows", [1, 8, 100])
def test_result_does_not_depend_on_the_number_of_threads(rows):
    case = append_case(4, rows=rows)
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            run = copied(case)
            append_context_kv(**run)
            outcomes.append(torch.stack(run["k_pools"] + run["v_pools"]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outcomes[0], outcomes[1]) and torch.equal(outcomes[0], outcomes[2])
