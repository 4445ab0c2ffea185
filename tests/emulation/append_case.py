"""One call of append_context_kv: random inputs, the emulated kernels, the float64 reference."""

from dataclasses import dataclass

import float64_reference
import torch
from emulated import (
    ContextKvOutput,
    Emulator,
    FuseNormParams,
    KvProjectWriteParams,
    Memory,
    NormRopeWriteParams,
    emulator,
)
from torch import Tensor


class ForeignWriteError(AssertionError):
    """A pool row was written that belongs to no valid token."""


@dataclass(frozen=True)
class AppendCase:
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

    def inputs(self) -> dict[str, Tensor]:
        """Tensors of the op; rows that do not count hold NaN, and a slot outside of every pool."""
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(self.dtype)

        rows, columns = self.num_rows, 2 * self.kv_heads * self.head_dim
        valid = self.valid_rows()
        hidden = torch.full((rows, self.taps * self.hidden), torch.nan, dtype=self.dtype)
        hidden[valid] = normal(len(valid), self.taps * self.hidden)
        cache_loc = torch.full((rows,), 2**40)
        cache_loc[valid] = torch.randperm(rows + 7, generator=g)[: len(valid)]
        positions = torch.full((rows,), 2**40)
        positions[valid] = torch.randint(0, 50, (len(valid),), generator=g)
        angles = torch.rand(50, self.rotary // 2, generator=g) * 6.28
        x = {
            "target_hidden": hidden,
            "fusion_probs": torch.randn(self.layers, self.taps, generator=g).softmax(-1),
            "norm_weight": 1 + normal(self.hidden) / 4,
            "kv_weight": normal(self.layers, columns, self.hidden) * self.hidden**-0.5,
            "k_norm_weight": 1 + normal(self.layers, self.head_dim) / 4,
            "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], 1),
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

    def valid_rows(self) -> Tensor:
        lens = None if self.commit_lens is None else torch.tensor(self.commit_lens)
        return float64_reference.valid_rows(lens, self.block, self.num_rows)

    def error(self, seed: int = 0, on: Emulator | None = None, fused: bool = True) -> float:
        """Largest relative error of a head; raises if a pool row that is not due was written."""
        emu = on or emulator(self.dtype, self.head_dim)
        x, valid = self.inputs(), self.valid_rows()
        with emu.memory() as memory:
            k_pools, v_pools = self._run(emu, memory, x, seed, fused)
        expected = float64_reference.context_kv(
            x["target_hidden"][valid],
            x["fusion_probs"],
            x["norm_weight"],
            1e-6,
            x["kv_weight"],
            x.get("kv_bias"),
            x["k_norm_weight"],
            1e-5,
            x["cos_sin_cache"],
            x["positions"][valid],
        )
        written = x["cache_loc"][valid]
        worst = 0.0
        for pools, before, reference in zip(
            (k_pools, v_pools), (x["k_pools"], x["v_pools"]), expected, strict=True
        ):
            untouched = torch.ones(pools.shape[1], dtype=torch.bool)
            untouched[written] = False
            if not torch.equal(pools[:, untouched], before[:, untouched]):
                raise ForeignWriteError("a slot that is not due was written")
            if len(valid):
                error = float64_reference.worst_row_error(pools[:, written], reference)
                worst = max(worst, error)
        return worst

    def _run(
        self, emu: Emulator, memory: Memory, inputs: dict[str, Tensor], seed: int, fused: bool
    ) -> tuple[Tensor, Tensor]:
        x = {name: memory.copy(name, tensor) for name, tensor in inputs.items()}
        states = memory.empty("fused", (self.layers, self.num_rows, self.hidden), self.dtype)
        compact_rows = None
        if self.commit_lens is not None:
            compact_rows = memory.empty("compact_rows", (1 + self.num_rows,), torch.int32)

        def address(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        emu.launch(
            "fuse_norm",
            FuseNormParams(
                element=emu.element,
                target_hidden=x["target_hidden"].data_ptr(),
                target_hidden_stride=x["target_hidden"].stride(0),
                probs=x["fusion_probs"].data_ptr(),
                norm_weight=x["norm_weight"].data_ptr(),
                eps=1e-6,
                commit_lens=address(x.get("commit_lens")),
                num_rows=self.num_rows,
                block_size=self.block,
                num_taps=self.taps,
                num_layers=self.layers,
                hidden=self.hidden,
                fused=states.data_ptr(),
                compact_rows=address(compact_rows),
            ),
        )
        out = ContextKvOutput(
            kv_bias=address(x.get("kv_bias")),
            k_norm_weight=x["k_norm_weight"].data_ptr(),
            k_norm_eps=1e-5,
            cos_sin=x["cos_sin_cache"].data_ptr(),
            rotary=self.rotary,
            positions=x["positions"].data_ptr(),
            cache_loc=x["cache_loc"].data_ptr(),
            compact_rows=address(compact_rows),
            num_rows=self.num_rows,
            num_layers=self.layers,
            kv_heads=self.kv_heads,
        )
        for layer in range(self.layers):
            out.k_pools[layer] = x["k_pools"][layer].data_ptr()
            out.v_pools[layer] = x["v_pools"][layer].data_ptr()
            out.k_strides[layer] = x["k_pools"].stride(1)
            out.v_strides[layer] = x["v_pools"].stride(1)
        if fused:
            params = KvProjectWriteParams(
                element=emu.element,
                head_dim=self.head_dim,
                hidden=self.hidden,
                fused=states.data_ptr(),
                kv_weight=x["kv_weight"].data_ptr(),
                overlap_launch=True,
                out=out,
            )
            emu.launch("kv_project_write", params)
        else:
            emu.synchronize(seed)
            kv = torch.bmm(states, x["kv_weight"].transpose(1, 2))
            kv = memory.copy("kv", kv)
            params = NormRopeWriteParams(
                element=emu.element, head_dim=self.head_dim, kv=kv.data_ptr(), out=out
            )
            emu.launch("norm_rope_write", params)
        emu.synchronize(seed)
        return x["k_pools"].clone(), x["v_pools"].clone()
