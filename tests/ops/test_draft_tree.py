"""Draft trees against references that share nothing with them: enumeration, sets and dicts."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_devices import DEVICES, KERNELS, place

from dflare.ops import (
    build_draft_tree,
    cut_draft_tree,
    move_tree_path,
    tree_ancestors,
    walk_draft_tree,
    write_tree_mask,
)


def on(device: str, function, *args):
    """The results of an operator that runs there, on the host."""
    with place(device) as at:
        there = [
            at.put(f"argument {i}", x) if isinstance(x, torch.Tensor) else x
            for i, x in enumerate(args)
        ]
        results = function(*there)
        at.wait()
        return [x.cpu().clone() for x in results]


def marginals(seed: int, bs: int, depths: int, ranks: int, vocab: int = 50):
    """Anchors, and the best tokens of each depth with their log-probabilities; no two are equal."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(bs, depths, vocab, generator=g, dtype=torch.float64)
    best = logits.log_softmax(-1).topk(ranks, -1)
    anchors = torch.randint(0, vocab, (bs,), generator=g)
    return anchors, best.indices, best.values.float()


def prefixes_of(tokens, parents) -> list[tuple[int, ...]]:
    """Of each drafted row of one tree, the tokens from the anchor's successor to it."""
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens.tolist()[1:], parents.tolist()[1:], strict=True):
        found.append((*found[parent], token))
    return found[1:]


def best_prefixes(tokens, log_probs, nodes: int, branch=()) -> dict[tuple[int, ...], float]:
    """The most probable of all prefixes, each with its own: every combination is looked at.

    `branch` has tokens with their log-probabilities, each behind those before it.
    """
    path = [token for token, _ in branch]
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    last = [()]
    for depth in range(max(len(tokens), len(path))):
        longer = {}
        for prefix in last:
            options = {}
            if depth < len(tokens):
                options |= zip(tokens[depth].tolist(), log_probs[depth].tolist(), strict=True)
            if depth < len(path) and list(prefix) == path[:depth]:
                token, log_prob = branch[depth]
                options[token] = max(log_prob, options.get(token, -math.inf))
            for token, log_prob in options.items():
                longer[*prefix, token] = scores[prefix] + log_prob
        scores |= longer
        last = list(longer)
    del scores[()]
    return {p: scores[p] for p in sorted(scores, key=lambda prefix: -scores[prefix])[:nodes]}


@DEVICES
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_tree_holds_the_most_probable_prefixes(device, data):
    nodes = data.draw(st.integers(0, 6))
    depths, ranks = data.draw(st.integers(1, 4)), max(1, nodes)
    bs = data.draw(st.integers(0, 3))
    anchors, best, log_probs = marginals(data.draw(st.integers(0, 1 << 20)), bs, depths, ranks)
    grown = on(device, build_draft_tree, anchors, best, log_probs, nodes)
    tokens, parents, levels = grown
    scores = torch.empty(bs, nodes + 1)
    build_draft_tree(anchors, best, log_probs, nodes, scores=scores)
    assert tokens.shape == parents.shape == levels.shape == (bs, nodes + 1)
    assert tokens[:, 0].equal(anchors)
    for b in range(bs):
        prefixes = prefixes_of(tokens[b], parents[b])
        wanted = best_prefixes(best[b], log_probs[b], nodes)
        assert set(prefixes) == set(wanted)
        assert scores[b].tolist() == pytest.approx([0, *map(wanted.get, prefixes)], abs=1e-5)
        assert levels[b].tolist() == [0, *map(len, prefixes)]
        assert parents[b, 0] == -1 and all(parents[b, 1:] < torch.arange(1, nodes + 1))


@DEVICES
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_a_branch_competes_with_the_drafter_and_shares_its_prefixes(device, data):
    nodes, depths = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    anchors, best, log_probs = marginals(data.draw(st.integers(0, 1 << 20)), 2, depths, nodes)
    longest = data.draw(st.integers(1, 5))
    # The drafter's own tokens or others, so that some prefixes are shared.
    branch = torch.full((2, longest), 99)
    for b, d in itertools.product(range(2), range(longest)):
        if data.draw(st.booleans()):
            branch[b, d] = best[b, min(d, depths - 1), data.draw(st.integers(0, nodes - 1))]
    lens = torch.tensor([data.draw(st.integers(0, longest)) for _ in range(2)]).int()
    certainty = data.draw(st.sampled_from([0.01, 1.0, 10.0]))
    chances = -certainty * (
        0.1 + torch.rand(2, longest, generator=torch.Generator().manual_seed(nodes))
    )
    drafts = best, log_probs, nodes
    grown = on(device, build_draft_tree, anchors, *drafts, branch, chances, lens)
    tokens, parents, depth = grown
    scores = torch.empty(2, nodes + 1)
    build_draft_tree(anchors, *drafts, branch, chances, lens, scores=scores)
    for b in range(2):
        proposed = list(zip(branch[b].tolist(), chances[b].tolist(), strict=True))[: lens[b]]
        prefixes = prefixes_of(tokens[b], parents[b])
        wanted = best_prefixes(best[b], log_probs[b], nodes, proposed)
        assert set(prefixes) == set(wanted)
        assert scores[b].tolist() == pytest.approx([0, *map(wanted.get, prefixes)], abs=1e-5)
        assert len(prefixes) == len(set(prefixes)) == nodes
        assert depth[b].tolist() == [0, *map(len, prefixes)]


@st.composite
def trees(draw):
    """Tokens and parents of a tree of few different tokens, no two children of a node alike."""
    width = draw(st.integers(1, 9))
    tokens, parents = [draw(st.integers(0, 3))], [-1]
    taken = set()
    for row in range(1, width):
        free = [(p, t) for p in range(row) for t in range(4) if (p, t) not in taken]
        parent, token = draw(st.sampled_from(free))
        taken.add((parent, token))
        parents.append(parent)
        tokens.append(token)
    return tokens, parents


@DEVICES
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_a_walk_is_what_decoding_token_by_token_accepts(device, data):
    tokens, parents = data.draw(trees())
    target = data.draw(st.lists(st.integers(0, 3), min_size=len(tokens), max_size=len(tokens)))
    stride = len(tokens) + data.draw(st.integers(0, 2))
    tree = torch.tensor([tokens]), torch.tensor([parents]).int()
    path, lens, committed = on(device, walk_draft_tree, *tree, torch.tensor([target]), stride)
    children = {(p, t): row for row, (p, t) in enumerate(zip(parents, tokens, strict=True))}
    row, rows = 0, [0]
    while (row := children.get((row, target[row]), -1)) >= 0:
        rows.append(row)
    n = len(rows)
    assert lens.tolist() == [n]
    assert path[0].tolist() == rows + rows[-1:] * (stride - n)
    assert committed[0].tolist() == [target[r] for r in rows] + [0] * (stride - n)
    assert rows == torch.where(tree_ancestors(torch.tensor([parents]))[0, rows[-1]])[0].tolist()


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_what_is_cut_off_stands_on_no_way_from_the_anchor(data):
    bs, width = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 6))
    counts = [data.draw(st.integers(1, width)) for _ in range(bs)]
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    whole = [torch.randint(0, 9, (bs, width), generator=g) for _ in range(3)]
    whole[1:] = [x.int() for x in whole[1:]]
    *cut, rows = cut_draft_tree(*whole, torch.tensor(counts, dtype=torch.long))
    kept = max(counts, default=0)
    for b, count in enumerate(counts):
        for x, all_of_it in zip(cut, whole, strict=True):
            assert x[b, :count].equal(all_of_it[b, :count])
        left = range(count, kept)
        assert [x[b, count:].tolist() for x in cut] == [
            [-1 for _ in left],
            [*left],
            [0 for _ in left],
        ]
    assert rows.tolist() == [b * kept + i for b, count in enumerate(counts) for i in range(count)]
    assert all(x.shape == (bs, kept) for x in cut)


@KERNELS
def test_trees_of_many_nodes_and_requests(device):
    """More nodes than a warp has lanes; the CPU's tree is held against all prefixes above."""
    anchors, best, log_probs = marginals(7, 5, 15, 63, vocab=200)
    given_tree = build_draft_tree(anchors, best, log_probs, 63)
    tree = on(device, build_draft_tree, anchors, best, log_probs, 63)
    assert all(map(torch.equal, tree, given_tree))
    tokens, parents, _ = tree
    target = tokens.roll(-1, 1)
    walked = on(device, walk_draft_tree, tokens, parents, target, 16)
    assert all(map(torch.equal, walked, walk_draft_tree(tokens, parents, target, 16)))


@KERNELS
def test_kernels_say_that_they_write_no_scores(device):
    anchors, best, log_probs = marginals(0, 1, 2, 3)

    def build(*args):
        return build_draft_tree(*args[:-1], scores=args[-1])

    with pytest.raises(RuntimeError, match="got scores, which are written on the CPU only"):
        on(device, build, anchors, best, log_probs, 3, torch.empty(1, 4))


@KERNELS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_mask_shows_each_node_its_ancestors_behind_the_context(device, dtype):
    anchors, best, log_probs = marginals(3, 4, 5, 39, vocab=60)
    _, parents, _ = build_draft_tree(anchors, best, log_probs, 39)
    lens = torch.tensor([0, 7, 100, 33], dtype=dtype)
    mask = torch.full((int((40 * (lens + 40)).sum()) + 9,), 7, dtype=torch.uint8)
    expected = mask.clone()
    rows = expected[:-9].split((40 * (lens + 40)).tolist())
    for own, length, seen in zip(rows, lens.tolist(), tree_ancestors(parents), strict=True):
        own.view(40, -1)[:, length:] = seen.to(torch.uint8)

    def write(parents, lens, mask):
        write_tree_mask(parents, lens, mask)
        return [mask]

    assert on(device, write, parents, lens, mask)[0].equal(expected)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_what_a_cache_holds_of_a_path_moves_to_the_front(data):
    bs, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    slots = torch.randperm(bs * width + 4, generator=g)[: bs * width].view(bs, width)
    path, lens = torch.zeros(bs, width, dtype=torch.int32), []
    for b in range(bs):
        further = sorted(data.draw(st.sets(st.integers(1, max(1, width - 1)))))
        rows = [0, *[r for r in further if r < width]]
        path[b, : len(rows)] = torch.tensor(rows)
        lens.append(len(rows))
    dtypes = [torch.float32, torch.bfloat16]
    pools = [torch.randn(bs * width + 4, 5, 16, generator=g).to(d)[:, :3] for d in dtypes]
    before = [pool.clone() for pool in pools]
    move_tree_path(path, torch.tensor(lens).int(), slots, pools)
    source = torch.arange(len(pools[0]))
    for b, length in enumerate(lens):
        source[slots[b, :length]] = slots[b, path[b, :length].long()]
    for pool, old in zip(pools, before, strict=True):
        assert pool.equal(old[source])


def build_case():
    anchors, best, log_probs = marginals(0, 2, 3, 4)
    return {
        "anchors": anchors,
        "tokens": best,
        "log_probs": log_probs,
        "nodes": 4,
        "branch": torch.zeros(2, 5, dtype=torch.long),
        "branch_log_probs": torch.zeros(2, 5),
        "branch_lens": torch.ones(2, dtype=torch.int32),
        "scores": torch.empty(2, 5),
    }


def cut_case():
    tokens = torch.zeros(2, 3, dtype=torch.long)
    rows = {"parents": tokens.int(), "depths": tokens.int()}
    return {"tokens": tokens, **rows, "counts": torch.tensor([3, 1])}


def walk_case():
    return {
        "tokens": torch.tensor([[1, 2, 3]]),
        "parents": torch.tensor([[-1, 0, 1]]).int(),
        "target_tokens": torch.tensor([[2, 3, 4]]),
        "stride": 3,
    }


def move_case():
    return {
        "path": torch.tensor([[0, 2, 2]]).int(),
        "commit_lens": torch.tensor([2]).int(),
        "slots": torch.tensor([[5, 6, 7]]),
        "pools": [torch.ones(8, 2, 16)],
    }


@pytest.mark.parametrize(
    ("function", "case", "change", "message"),
    [
        (build_draft_tree, build_case, {"nodes": 5}, "nodes is 5 and tokens has shape [2, 3, 4]"),
        (build_draft_tree, build_case, {"nodes": -1}, "nodes is -1"),
        (build_draft_tree, build_case, {"anchors": torch.ones(3).long()}, "expected [3, -1, -1]"),
        (
            build_draft_tree,
            build_case,
            {"branch": None},
            "got some of branch, branch_log_probs and",
        ),
        (
            build_draft_tree,
            build_case,
            {"branch_lens": torch.tensor([1, 6]).int()},
            "branch_lens[1] is 6, expected 0 to 5",
        ),
        (
            build_draft_tree,
            build_case,
            {"log_probs": torch.ones(2, 3, 4).double()},
            "log_probs has dtype Double, expected Float",
        ),
        (
            build_draft_tree,
            build_case,
            {"scores": torch.empty(2, 4)},
            "scores has shape [2, 4], expected [2, 5]",
        ),
        (
            cut_draft_tree,
            cut_case,
            {"counts": torch.tensor([3, 0])},
            "counts[1] is 0, expected 1 to 3",
        ),
        (
            cut_draft_tree,
            cut_case,
            {"counts": torch.tensor([4, 1])},
            "counts[0] is 4, expected 1 to 3",
        ),
        (cut_draft_tree, cut_case, {"depths": torch.zeros(2, 2).int()}, "depths has shape [2, 2]"),
        (walk_draft_tree, walk_case, {"stride": 2}, "request 0 commits more than stride = 2"),
        (walk_draft_tree, walk_case, {"stride": 0}, "stride is 0"),
        (walk_draft_tree, walk_case, {"parents": torch.zeros(1, 3).long()}, "parents has dtype"),
        (
            move_tree_path,
            move_case,
            {"path": torch.tensor([[0, 0, 0]]).int()},
            "path[0][1] is 0, expected 1 to 2",
        ),
        (
            move_tree_path,
            move_case,
            {"commit_lens": torch.tensor([4]).int()},
            "commit_lens[0] is 4, expected 0 to 3",
        ),
        (
            move_tree_path,
            move_case,
            {"slots": torch.tensor([[5, 6, 8]])},
            "request 0 moves slot 8 to 6, but the pools have 8 slots",
        ),
    ],
)
def test_what_does_not_fit_is_refused(function, case, change, message):
    arguments = case() | change
    with pytest.raises(RuntimeError) as error:
        function(**arguments)
    assert str(error.value).startswith(function.__name__ + ": ") and message in str(error.value)
    assert all(pool.eq(1).all() for pool in arguments.get("pools", ()))


@pytest.mark.parametrize(
    ("operator", "case"),
    [
        ("build_draft_tree", build_case),
        ("cut_draft_tree", cut_case),
        ("walk_draft_tree", walk_case),
        ("move_tree_path", move_case),
    ],
)
def test_tree_operators_are_registered_as_torch_expects(operator, case):
    checks = ("test_schema", "test_autograd_registration")
    op = getattr(torch.ops.dflare, operator).default
    result = torch.library.opcheck(op, (), case(), test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}
