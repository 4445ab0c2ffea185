import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import PagedCase
from op_devices import ATTENTION_TOLERANCE, threads

from dflare.ops import paged_attention, paged_attention_reference

DTYPES = [torch.float32, torch.bfloat16]


def run(case: PagedCase, **changed) -> torch.Tensor:
    return case.call(paged_attention, case.inputs() | changed)


def check(case: PagedCase) -> None:
    assert case.error(run(case)) < ATTENTION_TOLERANCE[case.dtype]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_equals_the_reference_for_any_mix_of_requests(data):
    draw = data.draw
    requests = st.tuples(st.sampled_from([0, 1, 2, 8, 33, 120]), st.integers(0, 150))
    queries, contexts = zip(*draw(st.lists(requests, min_size=1, max_size=5)), strict=True)
    case = PagedCase(
        queries,
        contexts,
        padding=draw(st.integers(0, 3)),
        kv_heads=draw(st.integers(1, 4)),
        group=draw(st.integers(1, 16)),
        head_dim=draw(st.sampled_from([16, 48, 64, 128, 256])),
        window=draw(st.sampled_from([-1, 0, 1, 7, 64, 100, 1 << 40])),
        causal=draw(st.booleans()),
        logit_scale=draw(st.sampled_from([1.0, 0.01, 8.0])),
        logit_cap=draw(st.sampled_from([0.0, 1.0, 30.0])),
        dtype=draw(st.sampled_from(DTYPES)),
        lens_64bit=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 20)),
    )
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "contexts"),
    [
        ((1,), (0,)),
        ((1,), (2047,)),
        ((1,) * 8, (511,) * 8),
        ((8,) * 4, (300,) * 4),
        ((600,), (100,)),
    ],
    ids=["first token", "decode", "decode batch", "verify", "prefill after a prefix"],
)
def test_is_as_accurate_as_pytorch_at_the_demo_targets_shapes(queries, contexts, dtype):
    case = PagedCase(queries, contexts, dtype=dtype)
    check(case)
    eager = case.error(case.call(paged_attention_reference, case.inputs()))
    assert case.error(run(case)) <= 1.5 * eager


@pytest.mark.parametrize("logit_scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("queries", [1, 20])
def test_capped_logits_equal_the_reference(queries, logit_scale):
    check(PagedCase((queries,), (90,), logit_scale=logit_scale, logit_cap=20.0))


def test_padding_rows_are_zero_and_are_not_read():
    out = run(PagedCase((3, 1), (5, 0), padding=4))
    assert (out[4:] == 0).all() and out[:4].isfinite().all()


def test_a_request_without_queries_may_hold_garbage():
    case = PagedCase((2, 0, 3), (5, 5, 5))
    x = case.inputs()
    expected = case.call(paged_attention, x)
    x["seq_lens"][1] = -7
    x["req_pool_indices"][1] = 1 << 40
    assert torch.equal(case.call(paged_attention, x), expected)


def plainly_decoded(case: PagedCase) -> torch.Tensor:
    """Every token alone, after those before it, by one thread."""
    x, out = case.inputs(), []
    with threads(1):
        for request, (count, context) in enumerate(zip(case.queries, case.contexts, strict=True)):
            for token in range(count):
                row = sum(case.queries[:request]) + token
                alone = {
                    "q": x["q"][row : row + 1],
                    "req_pool_indices": x["req_pool_indices"][request : request + 1],
                    "seq_lens": torch.tensor([context + token + 1]),
                    "query_start": torch.tensor([0, 1]),
                }
                out.append(case.call(paged_attention, x | alone))
    return torch.cat(out)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_token_has_the_bits_of_plain_decoding_in_any_batch(data):
    """In prefill and verify, beside other requests, shared by any number of threads."""
    draw = data.draw
    requests = st.tuples(st.sampled_from([1, 2, 6, 17, 40]), st.integers(0, 600))
    queries, contexts = zip(*draw(st.lists(requests, min_size=1, max_size=3)), strict=True)
    case = PagedCase(
        queries,
        contexts,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 9)),
        head_dim=draw(st.sampled_from([16, 64, 128])),
        window=draw(st.sampled_from([-1, 7, 64, 300])),
        logit_cap=draw(st.sampled_from([0.0, 30.0])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1 << 20)),
    )
    with threads(draw(st.sampled_from([1, 2, 5]))):
        out = run(case)
    assert out.equal(plainly_decoded(case))


def test_a_window_leaves_out_pool_slots_before_it():
    case = PagedCase((4,), (300,), window=40)
    x = case.inputs()
    clean = case.call(paged_attention, x)
    freed = x["req_to_token"][x["req_pool_indices"][0], : 300 - 40].long()
    for name in ("k_pool", "v_pool"):
        x[name][freed] = torch.nan
    assert torch.equal(case.call(paged_attention, x), clean)


def test_an_empty_batch_gives_zero_rows():
    out = run(PagedCase((), (), padding=2))
    assert out.shape == (2, 9 * 64) and (out == 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "contexts"), [((1,), (30,)), ((1,), (1500,)), ((8, 1, 200), (900, 3, 0))]
)
def test_any_number_of_threads_gives_the_same_bits(queries, contexts, causal):
    case = PagedCase(queries, contexts, causal=causal)
    outs = []
    for count in (1, 2, 5, 16):
        with threads(count):
            outs.append(run(case))
    check(case)
    assert all(out.equal(outs[0]) for out in outs)


def tree_parents(seed: int, queries: tuple[int, ...], padding: int = 0) -> torch.Tensor:
    """Random trees, one a request; what stands for padding is nobody's parent."""
    g = torch.Generator().manual_seed(seed)
    parents = [
        -1 if node == 0 else int(torch.randint(0, node, (), generator=g))
        for count in queries
        for node in range(count)
    ]
    return torch.tensor(parents + [1 << 20] * padding, dtype=torch.int32)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_trees_equal_the_reference(data):
    draw = data.draw
    requests = st.tuples(st.sampled_from([0, 1, 2, 8, 33]), st.integers(0, 150))
    queries, contexts = zip(*draw(st.lists(requests, min_size=1, max_size=4)), strict=True)
    case = PagedCase(
        queries,
        contexts,
        padding=draw(st.integers(0, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 16)),
        head_dim=draw(st.sampled_from([16, 64, 128])),
        window=draw(st.sampled_from([-1, 0, 1, 7, 64, 100])),
        logit_scale=draw(st.sampled_from([1.0, 8.0])),
        logit_cap=draw(st.sampled_from([0.0, 30.0])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1 << 20)),
    )
    parents = tree_parents(case.seed, queries, case.padding)
    out = run(case, parents=parents)
    assert case.error(out, parents) < ATTENTION_TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [0, 40, 57, 63, 64, 200, 250, 700])
@pytest.mark.parametrize("group", [1, 2])
def test_a_node_has_the_bits_of_plain_decoding(context, group, dtype):
    """Whatever stands beside it, and though its slot lies in another tile of keys."""
    case = PagedCase((12,), (context,), kv_heads=1, group=group, dtype=dtype)
    x, parents = case.inputs(), tree_parents(context, (12,))
    out = case.call(paged_attention, x | {"parents": parents})
    for node in range(12):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, int(parents[path[0]]))
        table, row = x["req_to_token"].clone(), int(x["req_pool_indices"][0])
        table[row, context : context + len(path)] = table[row, [context + i for i in path]]
        alone = {
            "q": x["q"][node : node + 1],
            "req_to_token": table,
            "seq_lens": torch.tensor([context + len(path)]),
            "query_start": torch.tensor([0, 1]),
        }
        assert out[node : node + 1].equal(case.call(paged_attention, x | alone))


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
    with pytest.raises(RuntimeError) as error:
        run(PagedCase((2, 2), (3, 4)), parents=torch.tensor(parents, dtype=torch.int32))
    assert str(error.value).startswith("paged_attention: " + message)
    with pytest.raises(RuntimeError, match="parents were given with causal = false"):
        run(PagedCase((2, 2), (3, 4), causal=False), parents=torch.tensor([-1, 0, -1, 0]).int())
