"""What `bench.training.fp8` rounds: weights an output channel, inputs a token, to e4m3."""

import torch
from bench.training.fp8 import Fp8Linear, quantise, rounded
from torch import nn


def test_rows_are_rounded_to_e4m3_with_a_scale_each():
    rows = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    once = rounded(rows)
    torch.testing.assert_close(rounded(once), once, rtol=1e-6, atol=0.0)
    # Three bits of mantissa: at most a sixteenth off, but near zero, where the scale's step counts.
    least = rows.abs().amax(-1, keepdim=True) / 448 * 2**-9
    assert ((once - rows).abs() <= rows.abs() / 16 + least).all()
    assert len(once[0].unique()) > 20 and not torch.equal(once, rows)


def test_every_linear_layer_is_replaced_once():
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": inner})
    before = model["b"][0]
    assert quantise(model) == 2
    assert isinstance(model["a"], Fp8Linear) and isinstance(model["b"][0], Fp8Linear)
    x = torch.randn(3, 8)
    expected = rounded(x) @ rounded(before.weight.data).T + before.bias
    torch.testing.assert_close(model["b"][0](x), expected)
