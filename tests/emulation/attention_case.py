"""One call of block_attention: random inputs, the emulated kernel, the float64 reference."""

from dataclasses import dataclass

import float64_reference
import torch
from emulated import AttentionScheduleParams, BlockAttentionParams, Emulator, Memory, emulator
from torch import Tensor

UNREADABLE_SLOT = 2**30  # beyond every pool: a kernel that looks it up faults


@dataclass(frozen=True)
class AttentionCase:
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
    sm_count: int = 4
    lens_64bit: bool = True
    layers: int = 1  # calls that share the schedule, each with its own qkv
    scheduled_lens: tuple[int, ...] | None = None  # what the schedule is made for, if not lens
    seed: int = 0

    def inputs(self) -> dict[str, Tensor]:
        """Tensors of the op; slots, table entries and rows outside the request are poisoned."""
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(self.dtype)

        batch, longest = len(self.lens), max(max(self.lens), 1)
        rows, max_position = batch * self.block, longest + 64
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
        angles = torch.rand(max_position, self.rotary // 2, generator=g) * 6.28
        positions = torch.tensor([length + 2 for length in self.lens])[:, None]
        positions = positions + torch.arange(self.block)
        sharpness = self.logit_scale**0.5
        return {
            "qkv": normal(self.layers, rows, (self.heads + 2 * self.kv_heads) * self.head_dim),
            "q_norm_weight": ((1 + normal(self.head_dim) / 4) * sharpness).to(self.dtype),
            "k_norm_weight": ((1 + normal(self.head_dim) / 4) * sharpness).to(self.dtype),
            "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], 1),
            "positions": positions.flatten(),
            "k_pool": pools[0] * sharpness,
            "v_pool": pools[1],
            "req_to_token": table,
            "req_pool_indices": table_rows,
            "seq_lens": torch.tensor(self.lens).to(
                torch.int64 if self.lens_64bit else torch.int32
            ),
        }

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def reference(self) -> Tensor:
        x = self.inputs()
        return torch.stack([self._layer_reference(x | {"qkv": qkv}) for qkv in x["qkv"]])

    def _layer_reference(self, inputs: dict[str, Tensor]) -> Tensor:
        return float64_reference.block_attention(
            **inputs,
            eps=1e-6,
            block_size=self.block,
            window=self.window,
            causal=self.causal,
            scale=self.scale,
            operand_dtype=self.dtype if self.logit_scale > 1 else torch.float64,
        )

    def run(self, seed: int = 0, on: Emulator | None = None) -> Tensor:
        """Schedules once and runs all layers; returns their outputs."""
        emu = on or emulator(self.dtype, self.head_dim)
        with emu.memory() as memory:
            return self._run(emu, memory, seed).clone()

    def _run(self, emu: Emulator, memory: Memory, seed: int) -> Tensor:
        batch = len(self.lens)
        x = {name: memory.copy(name, tensor) for name, tensor in self.inputs().items()}
        plan = emu.plan_attention(
            batch, self.block, self.heads, self.kv_heads, self.sm_count, 228 << 10
        )
        schedule = memory.empty("schedule", (emu.schedule_size(plan),), torch.int32)
        partials = memory.empty("partials", (emu.partials_size(plan),), torch.float32)
        lens = memory.copy("lens", torch.tensor(self.scheduled_lens or self.lens).to(x["seq_lens"]))
        emu.launch(
            "block_attention_schedule",
            AttentionScheduleParams(
                seq_lens=lens.data_ptr(),
                seq_lens_64bit=self.lens_64bit,
                batch_size=batch,
                head_dim=self.head_dim,
                window=self.window,
                plan=plan,
                schedule=schedule.data_ptr(),
            ),
        )
        shape = (self.layers, batch * self.block, self.heads * self.head_dim)
        out = memory.empty("out", shape, self.dtype)
        for layer in range(self.layers):
            params = BlockAttentionParams(
                element=emu.element,
                qkv=x["qkv"][layer].data_ptr(),
                qkv_stride=x["qkv"].stride(1),
                eps=1e-6,
                cos_sin=x["cos_sin_cache"].data_ptr(),
                rotary=self.rotary,
                k_stride=x["k_pool"].stride(0),
                v_stride=x["v_pool"].stride(0),
                req_to_token_stride=x["req_to_token"].stride(0),
                seq_lens_64bit=self.lens_64bit,
                batch_size=batch,
                block_size=self.block,
                num_heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                window=self.window,
                causal=self.causal,
                scale=self.scale,
                plan=plan,
                schedule=schedule.data_ptr(),
                partials=partials.data_ptr(),
                out=out[layer].data_ptr(),
                overlap_launch=True,
            )
            for name in (
                "q_norm_weight", "k_norm_weight", "positions", "k_pool", "v_pool",
                "req_to_token", "req_pool_indices", "seq_lens",
            ):  # fmt: skip
                setattr(params, name, x[name].data_ptr())
            emu.launch("block_attention", params)
        emu.synchronize(seed)
        return out

    def error(self, seed: int = 0, on: Emulator | None = None) -> float:
        """Largest relative error of a head of a token."""
        out = self.run(seed, on).unflatten(-1, (self.heads, self.head_dim))
        reference = self.reference().unflatten(-1, (self.heads, self.head_dim))
        return float64_reference.worst_row_error(out, reference)
