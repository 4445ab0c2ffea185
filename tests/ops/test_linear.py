"""`linear` is a matrix product, and a row's bits do not depend on the rows beside it."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflare.ops import linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def make(seed, rows, inputs, outputs, dtype, bias=False):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=draw).to(dtype)
    weight = torch.randn(outputs, inputs, generator=draw).to(dtype)
    return x, weight, torch.randn(outputs, generator=draw).to(dtype) if bias else None


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1 << 20),
    rows=st.sampled_from([0, 1, 2, 3, 6, 7, 8, 13, 127, 128, 129, 260]),
    inputs=st.one_of(st.integers(0, 70), st.sampled_from([128, 576, 1000])),
    outputs=st.integers(0, 100),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_the_product_in_float64(seed, rows, inputs, outputs, bias, dtype):
    x, weight, b = make(seed, rows, inputs, outputs, dtype, bias)
    exact = x.double() @ weight.double().T + (b.double() if bias else 0.0)
    size = x.double().abs() @ weight.double().abs().T + 1.0  # what rounding is relative to
    out = linear(x, weight, b)
    assert out.dtype == dtype and out.shape == (rows, outputs)
    assert ((out.double() - exact).abs() <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("inputs", [576, 1000])
def test_a_row_has_the_same_bits_alone_and_beside_others(dtype, inputs):
    x, weight, bias = make(1, 200, inputs, 70, dtype, bias=True)
    together = linear(x, weight, bias)
    for rows in (slice(0, 1), slice(5, 13), slice(100, 131), slice(190, 200)):
        assert torch.equal(linear(x[rows], weight, bias), together[rows])


def test_rows_may_lie_apart():
    x, weight, _ = make(2, 10, 128, 40, torch.float32)
    assert torch.equal(
        linear(x[:, :64], weight[:, :64].contiguous()),
        linear(x[:, :64].contiguous(), weight[:, :64].contiguous()),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, "x has shape [3], expected [-1, -1] = [rows, inputs]"),
        ({"x": torch.zeros(2, 7)}, "weight has shape [4, 8], expected [-1, 7]"),
        ({"x": torch.zeros(8, 2).T}, "x of shape [2, 8] has strides [1, 2]"),
        ({"weight": torch.zeros(8, 4).T}, "weight of shape [4, 8] has strides [1, 4]"),
        ({"weight": torch.zeros(4, 8).bfloat16()}, "weight has dtype BFloat16, expected Float"),
        ({"bias": torch.zeros(5)}, "bias has shape [5], expected [4] = [outputs]"),
        ({"bias": torch.zeros(4).bfloat16()}, "bias has dtype BFloat16, expected Float"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), "bias": torch.zeros(4)} | change
    with pytest.raises(RuntimeError, match=r"^linear: .*" + re.escape(message)):
        linear(**case)


def test_half_precision_is_refused():
    with pytest.raises(RuntimeError, match="x has dtype Half, expected Float or BFloat16"):
        linear(torch.zeros(2, 8).half(), torch.zeros(4, 8).half())
