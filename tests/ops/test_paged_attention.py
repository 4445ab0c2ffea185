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


def tree_parents(g: torch.Generator, queries: list[int], padding: int = 0) -> torch.Tensor:
    """Random trees, one a request; what stands for padding is nobody's parent."""
    parents = [
        -1 if node == 0 else int(torch.randint(0, node, (), generator=g))
        for count in queries
        for node in range(count)
    ]
    return torch.tensor(parents + [1 << 20] * padding, dtype=torch.int32)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_trees_equal_the_reference(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    seed = data.draw(st.integers(0, 1 << 20))
    requests = st.tuples(st.sampled_from([0, 1, 2, 8, 33]), st.integers(0, 150))
    queries, contexts = zip(*data.draw(st.lists(requests, min_size=1, max_size=4)), strict=True)
    padding = data.draw(st.integers(0, 3))
    case = paged_case(
        seed,
        dtype=dtype,
        queries=list(queries),
        contexts=list(contexts),
        padding=padding,
        kv_heads=data.draw(st.integers(1, 3)),
        group=data.draw(st.integers(1, 16)),
        head_dim=data.draw(st.sampled_from([16, 64, 128])),
        window=data.draw(st.sampled_from([-1, 0, 1, 7, 64, 100])),
        logit_scale=data.draw(st.sampled_from([1.0, 8.0])),
        logit_cap=data.draw(st.sampled_from([0.0, 30.0])),
    )
    case["parents"] = tree_parents(torch.Generator().manual_seed(seed), list(queries), padding)
    assert_accurate(paged_attention, paged_attention_reference, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [0, 40, 57, 63, 64, 200])
@pytest.mark.parametrize("group", [1, 2])
def test_a_node_has_the_bits_of_plain_decoding(context, group, dtype):
    """Whatever stands beside it, and though its slot lies in another tile of keys."""
    case = paged_case(8, dtype=dtype, queries=[12], contexts=[context], kv_heads=1, group=group)
    parents = case["parents"] = tree_parents(torch.Generator().manual_seed(context), [12])
    close = 1e-5 if dtype == torch.float32 else 2**-7
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them cut a context where the work of a step is halved
    try:
        out = paged_attention(**case)
        for node in range(12):
            path = [node]
            while parents[path[0]] >= 0:
                path.insert(0, int(parents[path[0]]))
            alone = dict(case, q=case["q"][node : node + 1], parents=None)
            table = alone["req_to_token"] = case["req_to_token"].clone()
            row = int(case["req_pool_indices"][0])
            table[row, context : context + len(path)] = table[row, [context + i for i in path]]
            alone["seq_lens"] = torch.tensor([context + len(path)])
            alone["query_start"] = torch.tensor([0, 1])
            expected = paged_attention(**alone)
            if context < 64:  # no tile is shared, where rows go side by side through vectors
                assert out[node : node + 1].equal(expected)
            assert torch.allclose(out[node : node + 1], expected, rtol=close, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([0, 0, -1, 0], "parents[0] is 0, expected -1 for a request's first query"),
        ([-1, 1, -1, 0], "parents[1] is 1, expected an earlier query of its request"),
        ([-1, 0, -1, -1], "parents[3] is -1, expected an earlier query of its request"),
        ([-1, 0, -1], "parents has shape [3], expected [4] = [Nq]"),
    ],
)
def test_parents_that_are_no_tree_are_refused(parents, message):
    case = paged_case(9, queries=[2, 2], contexts=[3, 4])
    with pytest.raises(RuntimeError) as error:
        paged_attention(**case, parents=torch.tensor(parents, dtype=torch.int32))
    assert str(error.value).startswith("paged_attention: " + message)
    with pytest.raises(RuntimeError, match="parents were given with causal = false"):
        paged_attention(**dict(case, causal=False), parents=torch.tensor([-1, 0, -1, 0]).int())
