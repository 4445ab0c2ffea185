import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import assert_accurate, paged_case

from dflare.ops import paged_attention, paged_attention_reference

DTYPES = [torch.float32, torch.bfloat16]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_equals_the_reference_for_any_mix_of_requests(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    requests = st.tuples(st.sampled_from([0, 1, 2, 8, 33, 120]), st.integers(0, 150))
    queries, contexts = zip(*data.draw(st.lists(requests, min_size=1, max_size=5)), strict=True)
    case = paged_case(
        data.draw(st.integers(0, 1 << 20)),
        dtype=dtype,
        queries=list(queries),
        contexts=list(contexts),
        padding=data.draw(st.integers(0, 3)),
        kv_heads=data.draw(st.integers(1, 4)),
        group=data.draw(st.integers(1, 16)),
        head_dim=data.draw(st.sampled_from([16, 48, 64, 128, 256])),
        window=data.draw(st.sampled_from([-1, 0, 1, 7, 64, 100, 1 << 40])),
        causal=data.draw(st.booleans()),
        logit_scale=data.draw(st.sampled_from([1.0, 0.01, 8.0])),
        logit_cap=data.draw(st.sampled_from([0.0, 1.0, 30.0])),
    )
    assert_accurate(paged_attention, paged_attention_reference, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "contexts"),
    [([1], [0]), ([1], [2047]), ([1] * 8, [511] * 8), ([8] * 4, [300] * 4), ([600], [100])],
    ids=["first token", "decode", "decode batch", "verify", "prefill after a prefix"],
)
def test_equals_the_reference_at_the_demo_targets_shapes(queries, contexts, dtype):
    case = paged_case(1, dtype=dtype, queries=queries, contexts=contexts)
    assert_accurate(paged_attention, paged_attention_reference, case, dtype, compare_to_eager=True)


@pytest.mark.parametrize("logit_scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("queries", [1, 20])
def test_capped_logits_equal_the_reference(queries, logit_scale):
    case = paged_case(1, queries=[queries], contexts=[90], logit_scale=logit_scale, logit_cap=20.0)
    assert_accurate(paged_attention, paged_attention_reference, case, torch.float32)


def test_padding_rows_are_zero_and_are_not_read():
    case = paged_case(2, queries=[3, 1], contexts=[5, 0], padding=4)
    out = paged_attention(**case)
    assert case["q"][4:].isnan().all()
    assert (out[4:] == 0).all() and out[:4].isfinite().all()


def test_a_request_without_queries_may_hold_garbage():
    case = paged_case(3, queries=[2, 0, 3], contexts=[5, 5, 5])
    expected = paged_attention(**case)
    case["seq_lens"][1] = -7
    case["req_pool_indices"][1] = 1 << 40
    assert torch.equal(paged_attention(**case), expected)


def test_a_token_gives_the_same_output_in_prefill_in_verify_and_in_decode():
    prefill = paged_case(4, queries=[100], contexts=[0])
    last = dict(prefill, q=prefill["q"][-1:], query_start=torch.tensor([0, 1]))
    block = dict(prefill, q=prefill["q"][-8:], query_start=torch.tensor([0, 8]))
    expected = paged_attention(**prefill)
    assert torch.allclose(paged_attention(**last), expected[-1:], rtol=1e-5, atol=1e-6)
    assert torch.allclose(paged_attention(**block), expected[-8:], rtol=1e-5, atol=1e-6)


def test_a_window_leaves_out_pool_slots_before_it():
    case = paged_case(5, queries=[4], contexts=[300], window=40)
    clean = paged_attention(**case)
    freed = case["req_to_token"][case["req_pool_indices"][0], : 300 - 40].long()
    case["k_pool"][freed] = float("nan")
    case["v_pool"][freed] = float("nan")
    assert torch.equal(paged_attention(**case), clean)


def test_an_empty_batch_gives_zero_rows():
    out = paged_attention(**paged_case(6, queries=[], contexts=[], padding=2))
    assert out.shape == (2, 9 * 64) and (out == 0).all()


@pytest.mark.parametrize(
    ("queries", "contexts"), [([1], [30]), ([1], [1500]), ([8, 1, 200], [900, 3, 0])]
)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_reference_result(queries, contexts, threads):
    case = paged_case(7, queries=queries, contexts=contexts)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_accurate(paged_attention, paged_attention_reference, case, torch.float32)
    finally:
        torch.set_num_threads(before)
