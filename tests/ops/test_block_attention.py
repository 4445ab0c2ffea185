import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import assert_accurate, block_case, copied

from dflare.ops import block_attention, block_attention_reference

DTYPES = [torch.float32, torch.bfloat16]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_equals_the_reference_for_any_shape(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    head_dim = data.draw(st.sampled_from([16, 32, 48, 64, 80, 128, 256]))
    case = block_case(
        data.draw(st.integers(0, 1 << 20)),
        dtype=dtype,
        seq_lens=data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=5)),
        block_size=data.draw(st.integers(1, 32)),
        kv_heads=data.draw(st.integers(1, 4)),
        group=data.draw(st.integers(1, 16)),
        head_dim=head_dim,
        rotary=data.draw(st.sampled_from([0, 2, 8, 16, head_dim // 2, head_dim])),
        window=data.draw(st.sampled_from([-1, 0, 1, 7, 64, 100, 1 << 40])),
        causal=data.draw(st.booleans()),
        logit_scale=data.draw(st.sampled_from([1.0, 0.01, 8.0])),
    )
    assert_accurate(block_attention, block_attention_reference, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seq_lens", [[0], [1], [63], [64], [2048], [0, 1, 511, 1000]])
def test_equals_the_reference_at_the_demo_drafters_shapes(seq_lens, dtype):
    case = block_case(1, dtype=dtype, seq_lens=seq_lens)
    assert_accurate(block_attention, block_attention_reference, case, dtype, compare_to_eager=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 256])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_equals_the_reference_for_every_head_and_group(group, head_dim, dtype):
    for block_size in (1, 2, 5, 32):
        case = block_case(
            block_size,
            dtype=dtype,
            seq_lens=[70, 3],
            block_size=block_size,
            kv_heads=2,
            group=group,
            head_dim=head_dim,
            rotary=head_dim // 2,
            causal=True,
            window=50,
        )
        assert_accurate(block_attention, block_attention_reference, case, dtype)


def test_a_window_leaves_out_pool_slots_before_it():
    """Slots that no query sees may have been freed: NaN there must not reach the output."""
    case = block_case(2, seq_lens=[300], window=40, causal=True)
    clean = block_attention(**case)
    freed = case["req_to_token"][case["req_pool_indices"][0], : 300 - 40].long()
    case["k_pool"][freed] = float("nan")
    case["v_pool"][freed] = float("nan")
    assert torch.equal(block_attention(**case), clean)


def test_the_pool_is_not_written():
    case = block_case(3, seq_lens=[10, 70])
    before = copied(case)
    block_attention(**case)
    assert torch.equal(before["k_pool"], case["k_pool"])
    assert torch.equal(before["v_pool"], case["v_pool"])


def test_logits_far_beyond_the_range_of_exp_stay_finite():
    case = block_case(4, seq_lens=[130], logit_scale=1e4)
    out = block_attention(**case)
    assert out.isfinite().all()
    assert torch.allclose(out, block_attention_reference(**case), atol=1e-4)


def test_a_nan_in_the_context_reaches_the_output_of_its_request_alone():
    case = block_case(5, seq_lens=[20, 30])
    slot = case["req_to_token"][case["req_pool_indices"][1], 7]
    case["v_pool"][slot] = float("nan")
    out = block_attention(**case)
    assert out[:8].isfinite().all() and out[8:].isnan().all()


def test_an_empty_batch_gives_an_empty_result():
    out = block_attention(**block_case(6, seq_lens=[]))
    assert out.shape == (0, 9 * 64)


@pytest.mark.parametrize("seq_lens", [[0], [100], [1000], [5, 2000, 64]])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_reference_result(seq_lens, threads):
    case = block_case(7, seq_lens=seq_lens)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_accurate(block_attention, block_attention_reference, case, torch.float32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("logit_scale", [1.0, 8.0])
def test_large_heads_and_logits_are_no_less_accurate_than_eager(head_dim, logit_scale):
    case = block_case(8, seq_lens=[300, 40], head_dim=head_dim, logit_scale=logit_scale)
    assert_accurate(
        block_attention, block_attention_reference, case, torch.float32, compare_to_eager=True
    )
