"""`head_argmax` is the argmax of the logits, to the token: of equals the lowest."""

import math
import re

import pytest
import torch
from emulated import Plant, emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from op_devices import CPU, CUDA, DTYPES, EMULATED, place
from torch import Tensor

from dflare.ops import head_argmax, head_argmax_reference, token_of

DEVICES = pytest.mark.parametrize("device", [CPU, EMULATED, CUDA])
# Logits of one to three tiles of 256 tokens at a time, as of a large vocabulary and many rows.
IN_PARTS = Plant("cuda/heuristics.h", "kMostLogits = 16 << 20", "kMostLogits = 1 << 10")


def draft(device: str, hidden: Tensor, weight: Tensor, *, seed=0, plants=(), **options):
    """Tokens and keys."""
    block = options.get("block_size", 1)
    rows = len(hidden) if block == 1 else len(hidden) // block * (block - 1)
    ids = options.pop("ids", None)
    with place(device, (hidden.dtype, 128), seed, plants=plants) as at:
        tokens = at.put("tokens", torch.full((rows,), -1))
        given = {"ids": None if ids is None else at.put("ids", ids)}
        x = at.put("hidden", hidden, late=True), at.put("weight", weight)
        keys = head_argmax(*x, tokens, **given, **options)
        at.wait()
        return tokens.cpu().clone(), keys.cpu().clone()


def whole_numbers(seed: int, rows: int, vocabulary: int, inputs: int, dtype):
    """Sums of small whole numbers are exact in any order, and often equal."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (rows, inputs), generator=g).to(dtype)
    return hidden, torch.randint(-2, 3, (vocabulary, inputs), generator=g).to(dtype)


@DEVICES
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_equals_the_argmax_of_the_logits(device, parts, data):
    block = data.draw(st.sampled_from([1, 2, 4, 7]))
    rows = block * data.draw(st.integers(0, 3))
    vocabulary = data.draw(st.one_of(st.integers(1, 40), st.sampled_from([512, 999, 5000])))
    dtype = data.draw(st.sampled_from(DTYPES[device]))
    x = whole_numbers(data.draw(st.integers(0, 1 << 20)), rows, vocabulary, 8, dtype)
    options = {"block_size": block, "first_id": data.draw(st.sampled_from([0, 1, 7000]))}
    if data.draw(st.booleans()):
        options["ids"] = 3 * torch.arange(vocabulary) + 1
    tokens, keys = draft(device, *x, plants=(IN_PARTS,) if parts else (), **options)
    assert torch.equal(tokens, head_argmax_reference(*x, **options))
    assert torch.equal(token_of(keys), tokens)


@DEVICES
def test_logits_are_compared_as_they_are_rounded(device):
    """256 and 257 are one bfloat16, so the lower token wins; no float16 or float32 would do so."""
    hidden = torch.ones(1, 8).bfloat16()
    weight = torch.zeros(20, 8).bfloat16()
    weight[5] = 32.0
    weight[9] = 32.0
    weight[9, 0] = 33.0
    assert draft(device, hidden, weight)[0].item() == 5


@DEVICES
def test_ranks_with_parts_of_a_vocabulary_agree_with_one_that_has_it_all(device):
    hidden, weight = whole_numbers(3, 12, 1000, 8, torch.bfloat16)
    whole, _ = draft(device, hidden, weight, block_size=4)
    starts = [0, 300, 301, 900]
    parts = zip(starts, [*starts[1:], 1000], strict=True)
    keys = [draft(device, hidden, weight[a:b], block_size=4, first_id=a)[1] for a, b in parts]
    assert torch.equal(token_of(torch.stack(keys).amax(0)), whole)


@DEVICES
@pytest.mark.parametrize(
    ("logits", "token"),
    [
        ([-math.inf] * 3, 0),
        ([-math.inf, -3.0, -3.0], 1),
        ([math.nan, 1.0, math.inf], 2),
        ([math.nan] * 3, 0),
    ],
)
def test_extreme_logits(device, logits, token):
    hidden, weight = torch.zeros(1, 8).bfloat16(), torch.zeros(len(logits), 8).bfloat16()
    hidden[0, 0], weight[:, 0] = 1.0, torch.tensor(logits)
    assert draft(device, hidden, weight)[0].item() == token


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(7, 8)}, "hidden has 7 rows, expected a multiple of block_size = 4"),
        ({"weight": torch.zeros(9, 7)}, "weight has shape [9, 7], expected [-1, 8]"),
        ({"weight": torch.zeros(0, 8)}, "weight has 0 rows, expected at least 1"),
        ({"tokens": torch.zeros(8).long()}, "tokens has shape [8], expected [6]"),
        ({"tokens": torch.zeros(6).int()}, "tokens has dtype Int, expected Long"),
        ({"ids": torch.zeros(8).long()}, "ids has shape [8], expected [9] = [vocabulary]"),
        ({"block_size": 0}, "block_size is 0, expected at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(device, change, message):
    x = {"hidden": torch.zeros(8, 8), "weight": torch.zeros(9, 8), "ids": torch.arange(9)}
    x |= {"tokens": torch.zeros(6).long(), "block_size": 4} | change
    floats = {name: x[name].bfloat16() for name in ("hidden", "weight")}
    expected = pytest.raises(RuntimeError, match="^head_argmax: " + re.escape(message))
    if device == "cpu":
        with expected:
            head_argmax(**x | floats)
        return
    with emulator(torch.bfloat16, 128).installed(), expected:
        head_argmax(**x | floats)
