"""Look-ups against the shortest possible search, and what they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import lookup_case
from op_devices import CPU, CUDA, EMULATED, KERNELS, place

from dflare.ops import lookup_continuations, lookup_continuations_reference


def look_up(text, count=4, **limits):
    """Of one text in the order of its slots."""
    tokens = torch.tensor(text[:-1] or [0]).int()
    table = torch.arange(len(tokens)).int()[None]
    lens, anchor = torch.tensor([len(text) - 1]), torch.tensor(text[-1:])
    found, length = lookup_continuations(
        tokens, table, torch.tensor([0]), lens, anchor, count, **limits
    )
    return found[0].tolist(), int(length)


@pytest.mark.parametrize("device", [CPU, EMULATED, CUDA])
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_equals_the_reference_for_any_texts(device, data):
    # Few different tokens: matches of all lengths, and texts that repeat themselves.
    x = lookup_case(
        data.draw(st.integers(0, 1 << 20)),
        data.draw(st.lists(st.integers(0, 700), min_size=1, max_size=3)),
        vocabulary=data.draw(st.sampled_from([1, 2, 3, 20])),
        repeat=data.draw(st.sampled_from([0, 1, 7, 90])),
        long=data.draw(st.booleans()),
    )
    longest = data.draw(st.sampled_from([3, 8, 64, 300]))
    limits = {"least_match": data.draw(st.integers(1, 3)), "longest_match": longest}
    count = data.draw(st.sampled_from([1, 5, 40, 300]))
    with place(device, seed=data.draw(st.integers(0, 1 << 20))) as at:
        there = {name: at.put(name, tensor) for name, tensor in x.items()}
        found = lookup_continuations(**there, count=count, **limits)
        at.wait()
        found = [tensor.cpu().clone() for tensor in found]
    expected = lookup_continuations_reference(**x, count=count, **limits)
    assert all(map(torch.equal, found, expected))


def test_the_longest_match_wins_over_later_ones():
    assert look_up([1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 1, 2, 3, 4], count=1) == ([50], 4)


def test_of_equally_long_matches_the_latest_wins():
    assert look_up([2, 3, 4, 50, 0, 2, 3, 4, 60, 1, 2, 3, 4], count=1) == ([60], 3)


def test_a_proposal_goes_on_with_itself_where_the_text_ends():
    assert look_up([7, 8, 7, 8, 7], count=5) == ([8, 7, 8, 7, 8], 3)


@pytest.mark.parametrize("text", [[5], [1, 2, 3], [1, 2, 9, 2, 3, 9, 4, 2, 3]])
def test_short_matches_do_not_count(text):
    assert look_up(text) == ([0] * 4, 0)


def test_longer_matches_than_the_longest_are_as_good():
    """The latest of them wins then."""
    text = [*range(20), 50, *range(10, 20), 60, *range(20)]
    assert look_up(text, count=1) == ([50], 20)
    assert look_up(text, count=1, longest_match=10) == ([60], 10)


@pytest.mark.parametrize("device", [CPU, EMULATED, CUDA])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"count": 0}, "count is 0, expected at least 1"),
        ({"least_match": 0}, "least_match is 0, expected 1 to longest_match = 8"),
        ({"least_match": 9}, "least_match is 9, expected 1 to longest_match = 8"),
    ],
    ids=str,
)
def test_says_which_limit_does_not_fit(device, changed, says):
    refuse(device, changed, says)


@KERNELS
@pytest.mark.parametrize("name", ["count", "longest_match"])
def test_says_which_limit_is_more_than_a_kernel_takes(device, name):
    most = {"count": 1 << 24, "longest_match": 1024}[name]
    refuse(device, {name: most + 1}, f"{name} is {most + 1}, expected at most {most}")


def refuse(device, changed, says):
    limits = {"count": 4, "least_match": 3, "longest_match": 8} | changed
    with place(device) as at:
        there = {
            name: at.put(name, tensor)
            for name, tensor in lookup_case(0, [20], vocabulary=3).items()
        }
        with pytest.raises(RuntimeError, match=f"lookup_continuations: {says}"):
            lookup_continuations(**there, **limits)
