"""Random calls of the two ops: inputs with all that must not matter poisoned, and references.

Shared by the GPU tests of this folder and by the emulator's tests.
"""

from dataclasses import dataclass

import float64_reference
import torch
from torch import Tensor

UNREADABLE_SLOT = 2**30  # beyond every pool: a kernel that looks it up faults
UNREADABLE_INDEX = 2**40


class ForeignWriteError(AssertionError):
    """A pool row was written that belongs to no valid token."""


def cos_sin_table(positions: int, rotary: int, generator: torch.Generator) -> Tensor:
    angles = torch.rand(positions, rotary // 2, generator=generator) * 6.28
    return torch.cat([angles.cos(), angles.sin()], 1)


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

    def inputs(self) -> dict[str, Tensor]:
        """Tensor arguments by name; qkv has a leading dimension of layers.

        Pool slots that no request owns are NaN, table entries beyond a context unreadable.
        """
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(self.dtype)

        batch, longest = len(self.lens), max(max(self.lens), 1)
        pages = [-(-length // self.page) for length in self.lens]
        page_of = torch.randperm(sum(pages) + 3, generator=g).tolist()
        slots = len(page_of) * self.page
        pools = torch.full((2, slots, self.kv_heads, self.head_dim), torch.nan, dtype=self.dtype)
        table = torch.full((batch + 2, longest + 5), UNREADABLE_SLOT, dtype=torch.int32)
        table_rows = torch.randperm(batch + 2, generator=g)[:batch]
        for row, length, count in zip(table_rows, self.lens, pages, strict=True):
            index = torch.arange(length)
            mine = torch.tensor([page_of.pop() for _ in range(count)], dtype=torch.long)
            context = mine[index // self.page] * self.page + index % self.page
            table[row, :length] = context.int()
            for pool in pools:
                pool[context] = normal(length, self.kv_heads, self.head_dim)
        positions = torch.tensor([length + 2 for length in self.lens])[:, None]
        positions = positions + torch.arange(self.block)
        sharpness = self.logit_scale**0.5
        columns = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": normal(self.layers, batch * self.block, columns),
            "q_norm_weight": ((1 + normal(self.head_dim) / 4) * sharpness).to(self.dtype),
            "k_norm_weight": ((1 + normal(self.head_dim) / 4) * sharpness).to(self.dtype),
            "cos_sin_cache": cos_sin_table(longest + 64, self.rotary, g),
            "positions": positions.flatten(),
            "k_pool": pools[0] * sharpness,
            "v_pool": pools[1],
            "req_to_token": table,
            "req_pool_indices": table_rows,
            "seq_lens": torch.tensor(self.lens).to(torch.int64 if self.lens_64bit else torch.int32),
        }

    def arguments(self, x: dict[str, Tensor], qkv: Tensor) -> tuple:
        """Of block_attention and its reference, all but the schedule."""
        return (
            qkv,
            x["q_norm_weight"],
            x["k_norm_weight"],
            1e-6,
            x["cos_sin_cache"],
            x["positions"],
            x["k_pool"],
            x["v_pool"],
            x["req_to_token"],
            x["req_pool_indices"],
            x["seq_lens"],
            self.block,
            self.window,
            self.causal,
            self.scale,
        )

    def schedule(self, ops, x: dict[str, Tensor]) -> Tensor:
        return ops.block_attention_schedule(
            x["seq_lens"], self.block, self.heads, self.kv_heads, self.head_dim, self.window
        )

    def error(self, out: Tensor) -> float:
        """Largest relative error of a head of a token; out is [layers, rows, heads * head_dim]."""
        x = self.inputs()
        reference = torch.stack(
            [
                float64_reference.block_attention(
                    **(x | {"qkv": qkv}),
                    eps=1e-6,
                    block_size=self.block,
                    window=self.window,
                    causal=self.causal,
                    scale=self.scale,
                    operand_dtype=self.dtype if self.logit_scale > 1 else torch.float64,
                )
                for qkv in x["qkv"]
            ]
        )
        heads = (self.heads, self.head_dim)
        return float64_reference.worst_row_error(
            out.unflatten(-1, heads), reference.unflatten(-1, heads)
        )


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
        lens = None if self.commit_lens is None else torch.tensor(self.commit_lens)
        return float64_reference.valid_rows(lens, self.block, self.num_rows)

    def inputs(self) -> dict[str, Tensor]:
        """Tensor arguments by name; pools have a leading dimension of layers.

        Rows that do not count hold NaN, and positions and slots outside of every table.
        """
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(self.dtype)

        rows, columns = self.num_rows, 2 * self.kv_heads * self.head_dim
        valid = self.valid_rows()
        hidden = torch.full((rows, self.taps * self.hidden), torch.nan, dtype=self.dtype)
        hidden[valid] = normal(len(valid), self.taps * self.hidden)
        cache_loc = torch.full((rows,), UNREADABLE_INDEX)
        cache_loc[valid] = torch.randperm(rows + 7, generator=g)[: len(valid)]
        positions = torch.full((rows,), UNREADABLE_INDEX)
        positions[valid] = torch.randint(0, 50, (len(valid),), generator=g)
        x = {
            "target_hidden": hidden,
            "fusion_probs": torch.randn(self.layers, self.taps, generator=g).softmax(-1),
            "norm_weight": 1 + normal(self.hidden) / 4,
            "kv_weight": normal(self.layers, columns, self.hidden) * self.hidden**-0.5,
            "k_norm_weight": 1 + normal(self.layers, self.head_dim) / 4,
            "cos_sin_cache": cos_sin_table(50, self.rotary, g),
            "positions": positions,
            "cache_loc": cache_loc,
            "k_pools": normal(self.layers, rows + 7, self.kv_heads, self.head_dim),
            "v_pools": normal(self.layers, rows + 7, self.kv_heads, self.head_dim),
        }
        if self.bias:
            x["kv_bias"] = normal(self.layers, columns)
        if self.commit_lens is not None:
            x["commit_lens"] = torch.tensor(self.commit_lens, dtype=torch.int32)
        return x

    def arguments(self, x: dict[str, Tensor]) -> tuple:
        """Of append_context_kv."""
        return (
            x["target_hidden"],
            x["fusion_probs"],
            x["norm_weight"],
            1e-6,
            x["kv_weight"],
            x.get("kv_bias"),
            x["k_norm_weight"],
            1e-5,
            x["cos_sin_cache"],
            x["positions"],
            x["cache_loc"],
            x.get("commit_lens"),
            self.block,
            list(x["k_pools"]),
            list(x["v_pools"]),
        )

    def error(self, k_pools: Tensor, v_pools: Tensor) -> float:
        """Largest relative error of a written head; raises if another slot was written."""
        x, valid = self.inputs(), self.valid_rows()
        due = {name: x[name][valid] for name in ("target_hidden", "positions")}
        expected = float64_reference.context_kv(*self.arguments(x | due)[:10])
        written = x["cache_loc"][valid]
        untouched = torch.ones(k_pools.shape[1], dtype=torch.bool)
        untouched[written] = False
        worst = 0.0
        for pools, before, reference in zip(
            (k_pools, v_pools), (x["k_pools"], x["v_pools"]), expected, strict=True
        ):
            if not torch.equal(pools[:, untouched], before[:, untouched]):
                raise ForeignWriteError("a slot that is not due was written")
            if len(valid):
                error = float64_reference.worst_row_error(pools[:, written], reference)
                worst = max(worst, error)
        return worst
