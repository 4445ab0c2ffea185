"""Random calls of the operators, with all that must not matter poisoned, and their errors.

One generator an operator, for every device; what is expected is the operator's own reference in
float64 (dflare.ops).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dflare import ops
from dflare.ops import BlockNorms, ContextWeights, PagedContext, Pools

UNREADABLE_SLOT = 2**30  # beyond every pool: a kernel that looks it up faults
UNREADABLE_INDEX = 2**40
Inputs = dict[str, Any]


class ForeignWriteError(AssertionError):
    """A pool row was written that belongs to no valid token."""


def worst_row_error(out: Tensor, reference: Tensor) -> float:
    """Largest |out - reference| / |reference| of a head of a token; NaN counts as inf."""
    if not out.numel():
        return 0.0
    error = (out.double() - reference).norm(dim=-1) / reference.norm(dim=-1)
    return error.nan_to_num(nan=float("inf")).max().item()


def exact(x: Inputs) -> Inputs:
    """Copies in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in x.items()
    }


def cos_sin_table(positions: int, rotary: int, generator: torch.Generator) -> Tensor:
    angles = torch.rand(positions, rotary // 2, generator=generator) * 6.28
    return torch.cat([angles.cos(), angles.sin()], 1)


def page_table(
    generator: torch.Generator, lengths: tuple[int, ...], page: int
) -> tuple[Tensor, Tensor, list[Tensor], int]:
    """req_to_token, its row and the slots of each request, and the number of slots.

    Pages lie in random order; entries beyond a length are unreadable.
    """
    counts = [-(-length // page) for length in lengths]
    page_of = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    slots = len(page_of) * page
    rows = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
    shape = (len(lengths) + 2, max(lengths, default=0) + 5)
    table = torch.full(shape, UNREADABLE_SLOT, dtype=torch.int32)
    contexts = []
    for row, length, count in zip(rows, lengths, counts, strict=True):
        index = torch.arange(length)
        mine = torch.tensor([page_of.pop() for _ in range(count)], dtype=torch.long)
        contexts.append(mine[index // page] * page + index % page)
        table[row, :length] = contexts[-1].int()
    return table, rows, contexts, slots


@dataclass(frozen=True)
class AppendCase:
    """append_context_kv of a batch of blocks, or of a run of rows."""

    commit_lens: tuple[int, ...] | None = None
    rows: int = 16  # without commit_lens; else len(commit_lens) * block
    block: int = 16
    taps: int = 3
    layers: int = 2
    hidden: int = 256
    kv_heads: int = 1
    head_dim: int = 128
    rotary: int = 128
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @property
    def num_rows(self) -> int:
        return self.rows if self.commit_lens is None else len(self.commit_lens) * self.block

    def valid_rows(self) -> Tensor:
        """Indices of the rows that count."""
        if self.commit_lens is None:
            return torch.arange(self.rows)
        valid = torch.arange(self.block) < torch.tensor(self.commit_lens)[:, None]
        return valid.flatten().nonzero().flatten()

    def inputs(self) -> Inputs:
        """Tensor arguments by name; pools have a leading dimension of layers.

        Rows that do not count hold NaN, and positions and slots outside of every table. Rows and
        slots lie further apart than they are long.
        """
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(self.dtype)

        rows, columns = self.num_rows, 2 * self.kv_heads * self.head_dim
        valid, width = self.valid_rows(), self.taps * self.hidden
        hidden = torch.full((rows, width + 16 - width % 16), torch.nan, dtype=self.dtype)[:, :width]
        hidden[valid] = normal(len(valid), width)
        cache_loc = torch.full((rows,), UNREADABLE_INDEX)
        cache_loc[valid] = torch.randperm(rows + 7, generator=g)[: len(valid)]
        positions = torch.full((rows,), UNREADABLE_INDEX)
        positions[valid] = torch.randint(0, 50, (len(valid),), generator=g)
        pool = (self.layers, rows + 7, self.kv_heads + 1, self.head_dim)
        x = {
            "target_hidden": hidden,
            "fusion_probs": torch.randn(self.layers, self.taps, generator=g).softmax(-1),
            "norm_weight": 1 + normal(self.hidden) / 4,
            "kv_weight": normal(self.layers, columns, self.hidden) * self.hidden**-0.5,
            "k_norm_weight": 1 + normal(self.layers, self.head_dim) / 4,
            "cos_sin_cache": cos_sin_table(50, self.rotary, g),
            "positions": positions,
            "cache_loc": cache_loc,
            "k_pools": normal(*pool)[:, :, :-1],
            "v_pools": normal(*pool)[:, :, :-1],
        }
        if self.bias:
            x["kv_bias"] = normal(self.layers, columns)
        if self.commit_lens is not None:
            x["commit_lens"] = torch.tensor(self.commit_lens, dtype=torch.int32)
        return x

    def call(self, function: Callable[..., None], x: Inputs) -> None:
        """Calls append_context_kv or its reference."""
        function(
            x["target_hidden"],
            ContextWeights(
                x["fusion_probs"],
                x["norm_weight"],
                1e-6,
                x["kv_weight"],
                x.get("kv_bias"),
                x["k_norm_weight"],
                1e-5,
            ),
            x["cos_sin_cache"],
            x["positions"],
            x["cache_loc"],
            x.get("commit_lens"),
            x.get("block_size", self.block),
            Pools(list(x["k_pools"]), list(x["v_pools"])),
        )

    def error(self, k_pools: Tensor, v_pools: Tensor) -> float:
        """Largest relative error of a written head; raises if another slot was written."""
        x = self.inputs()
        expected = exact(x)
        self.call(ops.append_context_kv_reference, expected)
        written = x["cache_loc"][self.valid_rows()]
        untouched = torch.ones(k_pools.shape[1], dtype=torch.bool)
        untouched[written] = False
        worst = 0.0
        for name, pools in (("k_pools", k_pools), ("v_pools", v_pools)):
            if not torch.equal(pools[:, untouched], x[name][:, untouched]):
                raise ForeignWriteError("a slot that is not due was written")
            worst = max(worst, worst_row_error(pools[:, written], expected[name][:, written]))
        return worst


@dataclass(frozen=True)
class AttentionCase:
    """block_attention of a batch, for one or more layers that share a schedule."""

    lens: tuple[int, ...]
    block: int = 16
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    rotary: int = 128
    dtype: torch.dtype = torch.bfloat16
    page: int = 1
    window: int = -1
    causal: bool = False
    logit_scale: float = 1.0  # standard deviation of the logits
    lens_64bit: bool = True
    layers: int = 1  # each with its own qkv
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def inputs(self) -> Inputs:
        """Tensor arguments by name; qkv has a leading dimension of layers.

        Pool slots that no request owns are NaN, table entries beyond a context unreadable. Rows and
        slots lie further apart than they are long.
        """
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(self.dtype)

        table, table_rows, contexts, slots = page_table(g, self.lens, self.page)
        shape = (2, slots, self.kv_heads + 1, self.head_dim)
        pools = torch.full(shape, torch.nan, dtype=self.dtype)[:, :, :-1]
        for context in contexts:
            for pool in pools:
                pool[context] = normal(len(context), self.kv_heads, self.head_dim)
        positions = torch.tensor(self.lens).long()[:, None] + 2 + torch.arange(self.block)
        sharpness = self.logit_scale**0.5
        columns = (self.heads + 2 * self.kv_heads) * self.head_dim
        rows = len(self.lens) * self.block
        return {
            "qkv": normal(self.layers, rows, columns + 8)[..., :columns],
            "q_norm_weight": ((1 + normal(self.head_dim) / 4) * sharpness).to(self.dtype),
            "k_norm_weight": ((1 + normal(self.head_dim) / 4) * sharpness).to(self.dtype),
            "cos_sin_cache": cos_sin_table(max(self.lens, default=0) + 64, self.rotary, g),
            "positions": positions.flatten(),
            "k_pool": pools[0].mul_(sharpness),
            "v_pool": pools[1],
            "req_to_token": table,
            "req_pool_indices": table_rows,
            "seq_lens": torch.tensor(self.lens).to(torch.int64 if self.lens_64bit else torch.int32),
        }

    def call(self, function: Callable[..., Tensor], x: Inputs, **more: Any) -> Tensor:
        """Calls block_attention or its reference with x["qkv"] of one layer."""
        names = ("k_pool", "v_pool", "req_to_token", "req_pool_indices", "seq_lens")
        return function(
            x["qkv"],
            BlockNorms(x["q_norm_weight"], x["k_norm_weight"], 1e-6),
            x["cos_sin_cache"],
            x["positions"],
            PagedContext(*(x[name] for name in names)),
            x.get("block_size", self.block),
            self.window,
            self.causal,
            x.get("scale", self.scale),
            **more,
        )

    def schedule(self, x: Inputs, seq_lens: Tensor | None = None) -> Tensor:
        """Made for other lengths if they are given."""
        lens = x["seq_lens"] if seq_lens is None else seq_lens
        return ops.block_attention_schedule(
            lens, self.block, self.heads, self.kv_heads, self.head_dim, self.window
        )

    def error(self, out: Tensor, *, tensor_cores: bool = False) -> float:
        """Largest relative error of a head of a token.

        Args:
            out: [layers, rows, heads * head_dim].
            tensor_cores: they take rounded queries and keys, which moves a logit by up to 2^-9 of
                its size: where logits are large, only a reference that rounds too can be close.
        """
        x = exact(self.inputs())
        rounded = {"operand_dtype": self.dtype} if tensor_cores and self.logit_scale > 1 else {}
        expected = [
            self.call(ops.block_attention_reference, x | {"qkv": qkv}, **rounded)
            for qkv in x["qkv"]
        ]
        heads = (self.heads, self.head_dim)
        return worst_row_error(out.unflatten(-1, heads), torch.stack(expected).unflatten(-1, heads))


@dataclass(frozen=True)
class PagedCase:
    """paged_attention: `contexts[b]` tokens before `queries[b]` of request b."""

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    padding: int = 0
    kv_heads: int = 3
    group: int = 3
    head_dim: int = 64
    window: int = -1
    causal: bool = True
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    dtype: torch.dtype = torch.float32
    lens_64bit: bool = True
    seed: int = 0

    def inputs(self) -> Inputs:
        """Tensor arguments by name; queries of padding and slots that nobody owns are NaN."""
        g = torch.Generator().manual_seed(self.seed)
        lens = tuple(q + c for q, c in zip(self.queries, self.contexts, strict=True))
        table, table_rows, contexts, slots = page_table(g, lens, 1)
        shape = (2, slots, self.kv_heads + 1, self.head_dim)
        pools = torch.full(shape, torch.nan, dtype=self.dtype)[:, :, :-1]
        for context in contexts:
            shape = (2, len(context), self.kv_heads, self.head_dim)
            pools[:, context] = torch.randn(shape, generator=g).to(self.dtype)
        rows, heads = sum(self.queries) + self.padding, self.group * self.kv_heads
        q = torch.randn(rows, heads + 2, self.head_dim, generator=g).to(self.dtype)[:, :heads]
        q[sum(self.queries) :] = torch.nan
        dtype = torch.int64 if self.lens_64bit else torch.int32
        return {
            "q": q,
            "k_pool": pools[0],
            "v_pool": pools[1],
            "req_to_token": table,
            "req_pool_indices": table_rows,
            "seq_lens": torch.tensor(lens).to(dtype),
            "query_start": torch.tensor([0, *self.queries]).cumsum(0).to(dtype),
        }

    def call(self, function: Callable[..., Tensor], x: Inputs) -> Tensor:
        """Calls paged_attention or its reference."""
        names = ("k_pool", "v_pool", "req_to_token", "req_pool_indices", "seq_lens")
        return function(
            x["q"],
            PagedContext(*(x[name] for name in names)),
            x["query_start"],
            self.window,
            self.causal,
            self.logit_scale * self.head_dim**-0.5,
            self.logit_cap,
            x.get("parents"),
        )

    def error(self, out: Tensor, parents: Tensor | None = None) -> float:
        """Largest relative error of a head of a token that is no padding."""
        rows, heads = sum(self.queries), (-1, self.head_dim)
        x = exact(self.inputs()) | {"parents": parents}
        expected = self.call(ops.paged_attention_reference, x)
        return worst_row_error(
            out[:rows].unflatten(-1, heads), expected[:rows].unflatten(-1, heads)
        )


def lookup_case(
    seed: int, lengths: list[int], *, vocabulary: int, repeat: int = 0, long: bool = True
) -> Inputs:
    """Arguments of lookup_continuations for texts of these lengths before their anchors.

    Args:
        vocabulary: different tokens.
        repeat: tokens with which every text begins and ends, if it is long enough.
        long: whether the lengths are int64.
    """
    g = torch.Generator().manual_seed(seed)
    table, rows, contexts, slots = page_table(g, tuple(lengths), 1)
    tokens = torch.full((slots,), -1).int()
    anchors = torch.randint(0, vocabulary, (len(lengths),), generator=g)
    for b, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        text = torch.randint(0, vocabulary, (length,), generator=g)
        if length > 2 * repeat > 0:
            text[length - repeat :] = text[:repeat]
            anchors[b] = text[repeat]
        tokens[context] = text.int()
    return {
        "tokens": tokens,
        "req_to_token": table,
        "req_pool_indices": rows,
        "seq_lens": torch.tensor(lengths, dtype=torch.int64 if long else torch.int32),
        "anchors": anchors,
    }
