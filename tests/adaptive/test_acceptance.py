import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflare.adaptive.acceptance import AcceptanceModel


def draw_accepted(rng, accept, width, batch):
    """Accepted tokens of a target that accepts position i with probability accept[i]."""
    hits = rng.random((batch, width - 1)) < np.asarray(accept)[: width - 1]
    return np.cumprod(hits, axis=1).sum(axis=1)


def expect(model, ids, left=100):
    """Expected tokens of the batch by width, and the hopeful ones; admits new requests."""
    return [tokens[0] for tokens in model.expected_tokens(ids, np.full(len(ids), left))]


def observe(model, ids, shown, accepted):
    model.age(ids, len(accepted))
    if shown:
        model.observe(0, ids, shown, accepted)


def tokens_by_hand(accept, width):
    return 1 + sum(np.prod(accept[:i]) for i in range(1, width))


def test_estimates_converge_to_the_true_acceptance():
    accept = [0.8, 0.6, 0.5, 0.4, 0.4, 0.3, 0.3]
    model = AcceptanceModel(block_size=8, memory=1000)
    rng = np.random.default_rng(0)
    seen = []
    for step in range(1000):
        ids = [(step + i) // 40 for i in range(0, 640, 40)]
        tokens, _ = expect(model, ids)
        seen.append(tokens / 16)
        observe(model, ids, 7, [draw_accepted(rng, accept, 8, 16)])
        if step % 40 == 39:
            model.finish(ids[0])
    mean = np.mean(seen[300:], axis=0)
    assert mean == pytest.approx([tokens_by_hand(accept, w) for w in range(1, 9)], rel=0.02)


def test_positions_beyond_the_width_are_not_taken_for_rejections():
    model = AcceptanceModel(block_size=8, memory=5000)
    rng = np.random.default_rng(1)
    for step in range(600):
        width = 8 if step % 10 == 0 else 2
        observe(model, range(8), width - 1, [draw_accepted(rng, [0.9] * 7, width, 8)])
    assert model.conditional() == pytest.approx(0.9, abs=0.06)


def test_positions_behind_a_rejection_are_not_counted():
    """With 0.3 at the front, counting hidden positions as rejected would put the back near 0.2."""
    accept = [0.3, 0.9, 0.9]
    model = AcceptanceModel(block_size=4, memory=5000)
    rng = np.random.default_rng(2)
    for _ in range(800):
        observe(model, range(8), 3, [draw_accepted(rng, accept, 4, 8)])
    assert model.conditional() == pytest.approx(accept, abs=0.07)


def test_an_easy_and_a_hard_request_are_told_apart():
    model = AcceptanceModel(block_size=8, memory=1000)
    rng = np.random.default_rng(3)
    expect(model, ["easy", "hard"])
    for _ in range(20):
        easy = draw_accepted(rng, [0.9] * 7, 8, 1)
        hard = draw_accepted(rng, [0.2] * 7, 8, 1)
        observe(model, ["easy", "hard"], 7, [np.concatenate((easy, hard))])
    easy, _ = expect(model, ["easy"])
    hard, _ = expect(model, ["hard"])
    assert easy[7] > 4 > 2 > hard[7]


def test_a_run_of_steps_teaches_what_its_steps_teach_one_by_one():
    at_once = AcceptanceModel(block_size=8, memory=1000)
    one_by_one = AcceptanceModel(block_size=8, memory=1000)
    rng = np.random.default_rng(5)
    ids = range(4)
    expect(at_once, ids), expect(one_by_one, ids)
    for _ in range(40):
        steps = [draw_accepted(rng, [0.7, 0.5, 0.5, 0.4, 0.3, 0.3, 0.2], 8, 4) for _ in range(8)]
        observe(at_once, ids, 7, steps)
        for step in steps:
            observe(one_by_one, ids, 7, [step])
    assert expect(at_once, ids)[0] == pytest.approx(expect(one_by_one, ids)[0], rel=0.01)
    assert expect(at_once, ids)[1] == pytest.approx(expect(one_by_one, ids)[1], rel=0.01)


def test_a_new_request_starts_from_what_the_server_saw():
    model = AcceptanceModel(block_size=8, memory=1000)
    rng = np.random.default_rng(4)
    for request in range(60):
        expect(model, [request])
        for _ in range(10):
            observe(model, [request], 7, [draw_accepted(rng, [0.2] * 7, 8, 1)])
        model.finish(request)
    tokens, _ = expect(model, ["new"])
    assert tokens[7] == pytest.approx(tokens_by_hand([0.2] * 7, 8), rel=0.2)


def test_hope_returns_when_nothing_is_observed():
    model = AcceptanceModel(block_size=8, memory=100)
    expect(model, ["r"])
    for _ in range(200):
        observe(model, ["r"], 7, [[0]])
    _, before = expect(model, ["r"])
    for _ in range(100):
        observe(model, ["r"], 0, [[0]])
    _, after = expect(model, ["r"])
    assert after[7] - 1 > 1.25 * (before[7] - 1)


def test_a_late_observation_of_an_ended_request_leaves_its_successor_alone():
    model = AcceptanceModel(block_size=8, memory=1000)
    ids = [f"old {i}" for i in range(200)]
    expect(model, ids)
    for rid in ids:
        model.finish(rid)
    successors = [f"new {i}" for i in range(200)]
    expect(model, successors)
    observe(model, ["old 7"], 7, [[7]])
    one_by_one = [expect(model, [rid])[0][7] for rid in successors]
    assert np.ptp(one_by_one) == 0


def test_requests_that_never_end_do_not_pile_up():
    model = AcceptanceModel(block_size=4, memory=100)
    for first in range(0, 50_000, 500):
        ids = range(first, first + 500)
        expect(model, ids)
        observe(model, ids, 3, [np.full(500, 1)])
    assert len(model._slot_of) <= 4096


@settings(deadline=None, max_examples=50)
@given(
    st.integers(2, 16),
    st.lists(st.integers(1, 40), min_size=1, max_size=9),
    st.integers(0, 2**32 - 1),
)
def test_expected_tokens_stay_within_what_is_possible(block_size, remaining, seed):
    model = AcceptanceModel(block_size, memory=50)
    rng = np.random.default_rng(seed)
    ids = list(range(len(remaining)))
    expect(model, ids)
    for _ in range(30):
        width = int(rng.integers(1, block_size + 1))
        observe(model, ids, width - 1, [rng.integers(0, width, len(ids))])
    left = np.array(remaining)
    most = [np.minimum(left, w).sum() for w in range(1, block_size + 1)]
    for (tokens,) in model.expected_tokens(ids, left):
        assert tokens[0] == pytest.approx(len(ids))
        assert (np.diff(tokens) >= -1e-9).all()
        assert (tokens <= np.array(most) + 1e-9).all()
