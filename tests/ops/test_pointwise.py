"""Norm, gate and rotary embedding equal their definitions in float64."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflare.ops import add_rms_norm, rotate_heads, silu_and_mul

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
DTYPES = st.sampled_from(list(TOLERANCE))
ROWS = st.sampled_from([0, 1, 2, 7, 40])
SEEDS = st.integers(0, 1 << 20)


def draw(seed, *shape, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def assert_near(out, exact, dtype):
    assert out.dtype == dtype and out.shape == exact.shape
    assert ((out.double() - exact).abs() <= TOLERANCE[dtype] * (1 + exact.abs())).all()


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    rows=ROWS,
    hidden=st.one_of(st.integers(1, 70), st.just(576)),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    with_residual=st.booleans(),
    dtype=DTYPES,
)
def test_add_rms_norm(seed, rows, hidden, scale, with_residual, dtype):
    x = draw(seed, rows, hidden + 3, dtype=dtype, scale=scale)[:, :hidden]  # rows lie apart
    residual = draw(seed + 1, rows, hidden, dtype=dtype, scale=scale) if with_residual else None
    weight = draw(seed + 2, hidden, dtype=dtype)
    total = x.double() + (residual.double() if with_residual else 0.0)
    rounded = (x + residual) if with_residual else None
    exact = total * (total.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert_near(add_rms_norm(x, residual, weight, 1e-5), exact, dtype)
    if with_residual:
        assert torch.equal(residual, rounded)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, rows=ROWS, width=st.integers(0, 70), dtype=DTYPES)
def test_silu_and_mul(seed, rows, width, dtype):
    x = draw(seed, rows, 2 * width, dtype=dtype, scale=5.0)
    gate, up = x.double().chunk(2, 1)
    assert_near(silu_and_mul(x), gate * gate.sigmoid() * up, dtype)


def test_gates_far_from_zero():
    x = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, *[1.0] * 6]])
    assert silu_and_mul(x)[0].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, 90.0, 1e30])


@settings(deadline=None, max_examples=30)
@given(
    seed=SEEDS,
    rows=ROWS,
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([16, 24, 64, 128]),
    partial=st.booleans(),
    dtype=DTYPES,
)
def test_rotate_heads(seed, rows, heads, head_dim, partial, dtype):
    rotary = head_dim // 2 if partial else head_dim
    wide = draw(seed, rows, (heads + 1) * head_dim, dtype=dtype)
    before = wide.clone()
    positions = torch.randint(0, 50, (rows,), generator=torch.Generator().manual_seed(seed))
    angles = torch.arange(50)[:, None] * torch.logspace(0, -3, rotary // 2)
    cache = torch.cat((angles.cos(), angles.sin()), 1)
    rotate_heads(wide[:, : heads * head_dim], cache, positions, head_dim)

    x = before.double()[:, : heads * head_dim].view(rows, heads, head_dim)
    cos, sin = (part[:, None] for part in cache[positions].double().chunk(2, 1))
    first, second, rest = x.split([rotary // 2, rotary // 2, head_dim - rotary], 2)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), 2)
    assert_near(wide[:, : heads * head_dim], turned.flatten(1), dtype)
    assert torch.equal(wide[:, heads * head_dim :], before[:, heads * head_dim :])


CACHE, POSITIONS = torch.zeros(9, 4), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (add_rms_norm, (torch.ones(2, 3), None, torch.ones(4), 0.1), "x has shape [2, 3]"),
        (
            add_rms_norm,
            (torch.ones(2, 4), torch.ones(3, 4), torch.ones(4), 0.1),
            "residual has shape [3, 4], expected [2, 4]",
        ),
        (
            add_rms_norm,
            (torch.ones(2, 4), torch.ones(2, 4).bfloat16(), torch.ones(4), 0.1),
            "residual has dtype BFloat16, expected Float",
        ),
        (silu_and_mul, (torch.ones(2, 3),), "x has shape [2, 3], expected an even number"),
        (silu_and_mul, (torch.ones(4, 2).T,), "x of shape [2, 4] has strides [1, 2]"),
        (rotate_heads, (torch.ones(2, 6), CACHE, POSITIONS, 4), "a multiple of head_dim = 4"),
        (rotate_heads, (torch.ones(2, 4), CACHE, POSITIONS + 9, 4), "positions[0] is 9"),
        (rotate_heads, (torch.ones(2, 2), CACHE, POSITIONS, 2), "of at most head_dim = 2"),
        (rotate_heads, (torch.ones(2, 4).half(), CACHE, POSITIONS, 4), "x has dtype Half"),
    ],
)
def test_what_does_not_fit_is_refused(function, arguments, message):
    expected = rf"^{function.__name__}: .*{re.escape(message)}"
    with pytest.raises(RuntimeError, match=expected):
        function(*arguments)
