"""Random arguments for the operators, and the error measure that the tests share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]


def rope_cache(max_pos: int, rotary: int, theta: float = 1e5) -> Tensor:
    frequency = theta ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angle = torch.arange(max_pos, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def pool(
    generator: torch.Generator, slots: int, heads: int, dim: int, dtype: torch.dtype
) -> Tensor:
    """[slots, heads, dim] with a slot stride larger than heads * dim, as in a packed K/V buffer."""
    return torch.randn(slots, heads + 1, dim, generator=generator).to(dtype)[:, :heads]


def append_case(
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    layers: int = 3,
    taps: int = 7,
    hidden: int = 576,
    kv_heads: int = 3,
    head_dim: int = 64,
    rotary: int | None = None,
    rows: int = 8,
    commit_lens: list[int] | None = None,
    block_size: int = 1,
    bias: bool = False,
) -> Case:
    """Arguments of append_context_kv; rows that `commit_lens` leaves out hold NaN and bad slots."""
    g = torch.Generator().manual_seed(seed)
    if commit_lens is not None:
        rows = len(commit_lens) * block_size
    slots, width = rows + 5, 2 * kv_heads * head_dim
    states = torch.randn(rows, taps * hidden + 3, generator=g)[:, : taps * hidden]
    cache_loc = torch.randperm(slots, generator=g)[:rows]
    positions = torch.randint(0, 512, (rows,), generator=g)
    if commit_lens is not None:
        ignored = torch.arange(block_size) >= torch.tensor(commit_lens).view(-1, 1)
        states[ignored.flatten()] = float("nan")
        cache_loc[ignored.flatten()] = 1 << 40
        positions[ignored.flatten()] = -(1 << 40)
    return {
        "target_hidden": states.to(dtype),
        "fusion_probs": torch.randn(layers, taps, generator=g).softmax(-1),
        "norm_weight": (1 + 0.2 * torch.randn(hidden, generator=g)).to(dtype),
        "eps": 1e-5,
        "kv_weight": (torch.randn(layers, width, hidden, generator=g) / hidden**0.5).to(dtype),
        "kv_bias": torch.randn(layers, width, generator=g).to(dtype) if bias else None,
        "k_norm_weight": (1 + 0.2 * torch.randn(layers, head_dim, generator=g)).to(dtype),
        "k_norm_eps": 1e-6,
        "cos_sin_cache": rope_cache(512, head_dim if rotary is None else rotary),
        "positions": positions,
        "cache_loc": cache_loc,
        "commit_lens": None if commit_lens is None else torch.tensor(commit_lens).int(),
        "block_size": block_size,
        "k_pools": [pool(g, slots, kv_heads, head_dim, dtype) for _ in range(layers)],
        "v_pools": [pool(g, slots, kv_heads, head_dim, dtype) for _ in range(layers)],
    }


def lookup_case(
    seed: int, lengths: list[int], *, vocabulary: int, repeat: int = 0, long: bool = True
) -> Case:
    """Arguments of lookup_continuations for texts of these lengths before their anchors.

    Args:
        vocabulary: different tokens.
        repeat: tokens with which every text begins and ends, if it is long enough.
        long: whether the lengths are int64.
    """
    g = torch.Generator().manual_seed(seed)
    table, rows = page_table(g, lengths)
    tokens = torch.full((sum(lengths) + 3,), -1).int()
    anchors = torch.randint(0, vocabulary, (len(lengths),), generator=g)
    for b, (row, length) in enumerate(zip(rows.tolist(), lengths, strict=True)):
        text = torch.randint(0, vocabulary, (length,), generator=g)
        if length > 2 * repeat > 0:
            text[length - repeat :] = text[:repeat]
            anchors[b] = text[repeat]
        tokens[table[row, :length].long()] = text.int()
    lens = torch.tensor(lengths)
    return {
        "tokens": tokens,
        "req_to_token": table,
        "req_pool_indices": rows,
        "seq_lens": lens if long else lens.int(),
        "anchors": anchors,
    }


def page_table(g: torch.Generator, lengths: list[int], spare: int = 3) -> tuple[Tensor, Tensor]:
    """req_to_token with every token in a random slot, garbage past each length, and its rows."""
    rows = torch.randperm(len(lengths) + 2, generator=g)[: len(lengths)]
    slots = torch.randperm(sum(lengths) + spare, generator=g).int()
    table = torch.full((len(lengths) + 2, max(lengths, default=0) + 4), 1 << 30).int()
    taken = 0
    for row, length in zip(rows.tolist(), lengths, strict=True):
        table[row, :length] = slots[taken : taken + length]
        taken += length
    return table, rows


def block_case(
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    seq_lens: list[int],
    block_size: int = 8,
    kv_heads: int = 3,
    group: int = 3,
    head_dim: int = 64,
    rotary: int | None = None,
    window: int = -1,
    causal: bool = False,
    logit_scale: float = 1.0,
) -> Case:
    """Arguments of block_attention."""
    g = torch.Generator().manual_seed(seed)
    rows, width = len(seq_lens) * block_size, (group + 2) * kv_heads * head_dim
    table, pool_rows = page_table(g, seq_lens)
    slots = sum(seq_lens) + 3
    max_pos = max(seq_lens, default=0) + block_size
    positions = (torch.tensor(seq_lens).view(-1, 1) + torch.arange(block_size)).flatten()
    return {
        "qkv": torch.randn(rows, width + 5, generator=g).to(dtype)[:, :width],
        "q_norm_weight": (1 + 0.2 * torch.randn(head_dim, generator=g)).to(dtype),
        "k_norm_weight": (1 + 0.2 * torch.randn(head_dim, generator=g)).to(dtype),
        "eps": 1e-6,
        "cos_sin_cache": rope_cache(max_pos, head_dim if rotary is None else rotary),
        "positions": positions.long(),
        "k_pool": pool(g, slots, kv_heads, head_dim, dtype),
        "v_pool": pool(g, slots, kv_heads, head_dim, dtype),
        "req_to_token": table,
        "req_pool_indices": pool_rows,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int64 if seed % 2 else torch.int32),
        "block_size": block_size,
        "window": window,
        "causal": causal,
        "scale": logit_scale * head_dim**-0.5,
    }


def paged_case(
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    queries: list[int],
    contexts: list[int],
    padding: int = 0,
    kv_heads: int = 3,
    group: int = 3,
    head_dim: int = 64,
    window: int = -1,
    causal: bool = True,
    logit_scale: float = 1.0,
    logit_cap: float = 0.0,
) -> Case:
    """Arguments of paged_attention: `contexts[b]` tokens before `queries[b]` of request b."""
    g = torch.Generator().manual_seed(seed)
    lengths = [q + c for q, c in zip(queries, contexts, strict=True)]
    rows, heads = sum(queries) + padding, group * kv_heads
    index_dtype = torch.int64 if seed % 2 else torch.int32
    table, pool_rows = page_table(g, lengths)
    q = torch.randn(rows, heads + 2, head_dim, generator=g).to(dtype)[:, :heads]
    q[sum(queries) :] = float("nan")
    return {
        "q": q,
        "k_pool": pool(g, sum(lengths) + 3, kv_heads, head_dim, dtype),
        "v_pool": pool(g, sum(lengths) + 3, kv_heads, head_dim, dtype),
        "req_to_token": table,
        "req_pool_indices": pool_rows,
        "seq_lens": torch.tensor(lengths, dtype=index_dtype),
        "query_start": torch.tensor([0, *queries]).cumsum(0).to(index_dtype),
        "window": window,
        "causal": causal,
        "scale": logit_scale * head_dim**-0.5,
        "logit_cap": logit_cap,
    }


def copied(case: Case, dtype: torch.dtype | None = None) -> Case:
    """The case with its tensors cloned (same strides); floating ones in `dtype`."""

    def convert(x: Any) -> Any:
        if isinstance(x, list):
            return [convert(y) for y in x]
        if not isinstance(x, Tensor):
            return x
        return x.to(dtype) if dtype and x.is_floating_point() else x.clone()

    return {name: convert(value) for name, value in case.items()}


def results(function: Callable[..., Any], case: Case) -> list[Tensor]:
    """What `function` returns or writes, as a list of tensors."""
    out = function(**case)
    return [out] if out is not None else [*case["k_pools"], *case["v_pools"]]


# Largest error relative to float64.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_accurate(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    case: Case,
    dtype: torch.dtype,
    *,
    compare_to_eager: bool = False,
) -> None:
    """Close to float64 and, if asked, not much worse than PyTorch's own result in the same dtype.

    The comparison is for results large enough that one lucky rounding does not decide it.
    """
    ours = results(function, copied(case))
    exact = results(reference, copied(case, torch.float64))
    for got, truth in zip(ours, exact, strict=True):
        assert got.dtype == dtype and got.shape == truth.shape
        assert relative_error(got, truth) <= TOLERANCE[dtype]
    if compare_to_eager:
        theirs = results(reference, copied(case))
        for got, eager, truth in zip(ours, theirs, exact, strict=True):
            assert relative_error(got, truth) <= 1.5 * relative_error(eager, truth)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of the exact result."""
    if exact.numel() == 0:
        return 0.0
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-300))
