"""All layers as one operator give the bits that the layers' own operators give one by one."""

import re

import pytest
import torch
from torch import Tensor

from dflare.ops import (
    DecoderWeights,
    PagedContext,
    add_rms_norm,
    decoder_layers,
    linear,
    paged_attention,
    rotate_heads,
    silu_and_mul,
)

LAYERS, HIDDEN, WIDE, SLOTS = 3, 64, 96, 80
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16  # 96 columns of queries, 160 of queries, keys and values
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make(dtype: torch.dtype, *, biases: bool = False, head_norms: bool = False) -> DecoderWeights:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    shapes = [(QKV, HIDDEN), (HIDDEN, HEADS * HEAD_DIM), (2 * WIDE, HIDDEN), (HIDDEN, WIDE)]
    return DecoderWeights(
        [1 + draw(HIDDEN) for _ in range(2 * LAYERS + 1)],
        [draw(*shape) for _ in range(LAYERS) for shape in shapes],
        [draw(QKV) for _ in range(LAYERS)] if biases else [],
        [1 + draw(HEAD_DIM) for _ in range(2 * LAYERS)] if head_norms else [],
        1e-5,
    )


def call(dtype: torch.dtype, queries=(1, 5, 2), lengths=(9, 5, 30), parents=None) -> dict:
    """Arguments of a batch whose requests have so many queries at the end of so many tokens."""
    generator = torch.Generator().manual_seed(3)
    slots = torch.randperm(SLOTS, generator=generator)[: sum(lengths)].int().split(lengths)
    table = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
    for row, own in zip(table, slots, strict=True):
        row[: len(own)] = own
    new = [own[-n:] for own, n in zip(slots, queries, strict=True)]
    positions = [torch.arange(n - q, n) for n, q in zip(lengths, queries, strict=True)]
    angles = torch.arange(40)[:, None] * torch.logspace(0, -3, HEAD_DIM // 2)
    pools = torch.randn(2 * LAYERS, SLOTS, KV_HEADS, HEAD_DIM, generator=generator).to(dtype)
    return {
        "embedded": torch.randn(sum(queries), HIDDEN, generator=generator).to(dtype),
        "cos_sin_cache": torch.cat((angles.cos(), angles.sin()), 1),
        "positions": torch.cat(positions),
        "pools": list(pools),
        "cache_loc": torch.cat(new).long(),
        "context": PagedContext(
            *(pools[0], pools[LAYERS], table),
            torch.arange(len(lengths)),
            torch.tensor(lengths),
        ),
        "query_start": torch.tensor([0, *queries]).cumsum(0),
        "window": -1,
        "scale": HEAD_DIM**-0.5,
        "logit_cap": 0.0,
        "parents": parents,
        "taps": [0, 2],
    }


def one_by_one(weights: DecoderWeights, x: dict) -> tuple[Tensor, Tensor]:
    residual, added, taps = x["embedded"].clone(), None, []
    rows = len(residual)

    def norm(scale: Tensor) -> Tensor:
        if added is None:
            return add_rms_norm(residual, None, scale, weights.eps)
        return add_rms_norm(added, residual, scale, weights.eps)

    for layer in range(LAYERS):
        qkv_matrix, output, gates, down = weights.matrices[4 * layer : 4 * layer + 4]
        normed = norm(weights.norms[2 * layer])
        if layer in x["taps"]:
            taps.append(residual.clone())
        bias = weights.biases[layer] if weights.biases else None
        qkv = linear(normed, qkv_matrix, bias)
        q, k, v = qkv.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], 1)
        if weights.head_norms:
            of_q, of_k = weights.head_norms[2 * layer : 2 * layer + 2]
            q = add_rms_norm(q.reshape(-1, HEAD_DIM), None, of_q, weights.eps).view(rows, -1)
            k = add_rms_norm(k.reshape(-1, HEAD_DIM), None, of_k, weights.eps).view(rows, -1)
        for heads in (q, k):
            rotate_heads(heads, x["cos_sin_cache"], x["positions"], HEAD_DIM)
        k_pool, v_pool = x["pools"][layer], x["pools"][LAYERS + layer]
        k_pool[x["cache_loc"]] = k.reshape(rows, KV_HEADS, HEAD_DIM)
        v_pool[x["cache_loc"]] = v.reshape(rows, KV_HEADS, HEAD_DIM)
        attended = paged_attention(
            q.reshape(rows, HEADS, HEAD_DIM),
            x["context"]._replace(k_pool=k_pool, v_pool=v_pool),
            x["query_start"],
            window=x["window"],
            causal=True,
            scale=x["scale"],
            logit_cap=x["logit_cap"],
            parents=x["parents"],
        )
        added = linear(attended, output)
        normed = norm(weights.norms[2 * layer + 1])
        added = linear(silu_and_mul(linear(normed, gates)), down)
    return norm(weights.norms[-1]), torch.cat(taps, 1) if taps else residual[:, :0]


def assert_same(weights: DecoderWeights, x: dict, y: dict) -> None:
    expected = one_by_one(weights, x)
    found = decoder_layers(weights=weights, **y)
    for a, b in zip((*expected, *x["pools"]), (*found, *y["pools"]), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@DTYPES
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("head_norms", [False, True])
def test_equals_its_parts(dtype, biases, head_norms):
    weights = make(dtype, biases=biases, head_norms=head_norms)
    assert_same(weights, call(dtype), call(dtype))


@DTYPES
@pytest.mark.parametrize("changed", [{"window": 3}, {"logit_cap": 2.0}, {"taps": []}])
def test_equals_its_parts_with_other_settings(dtype, changed):
    assert_same(make(dtype), call(dtype) | changed, call(dtype) | changed)


@DTYPES
def test_equals_its_parts_over_trees(dtype):
    parents = torch.tensor([-1, -1, 0, 0, 2, 1, -1, 0], dtype=torch.int32)
    assert_same(make(dtype), call(dtype, parents=parents), call(dtype, parents=parents))


@DTYPES
def test_a_row_keeps_its_bits_whatever_stands_beside_it(dtype):
    weights, x, y = make(dtype), call(dtype), call(dtype)
    hidden, tapped = decoder_layers(weights=weights, **x)
    own = slice(1, 6)  # the second request
    y["context"] = y["context"]._replace(
        req_pool_indices=torch.tensor([1]), seq_lens=torch.tensor([5])
    )
    y |= {name: y[name][own] for name in ("embedded", "positions", "cache_loc")}
    y["query_start"] = torch.tensor([0, 5])
    alone, alone_tapped = decoder_layers(weights=weights, **y)
    assert torch.equal(alone, hidden[own]) and torch.equal(alone_tapped, tapped[own])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache_loc": torch.tensor([0, 1, 2, 3, 4, 5, 6, SLOTS])}, "cache_loc[7] is 80"),
        ({"positions": torch.tensor([0, 1, 2, 3, 4, 5, 6, 40])}, "positions[7] is 40"),
        ({"query_start": torch.tensor([0, 1, 6, 7])}, "query_start ends with 7"),
        ({"taps": [LAYERS]}, "a tap is 3, expected 0 to 2"),
        ({"pools": [torch.zeros(SLOTS, KV_HEADS, HEAD_DIM)] * 4}, "pools has 4 tensors"),
        ({"embedded": torch.zeros(8, 32)}, "matrices has shape [160, 64], expected [160, 32]"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(RuntimeError, match=f"^decoder_layers: .*{re.escape(message)}"):
        decoder_layers(weights=make(torch.float32), **call(torch.float32) | changed)
