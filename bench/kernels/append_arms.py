"""What the append_context_kv benchmark runs on, and its arms."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import Arm, build
from models import Pair
from torch import Tensor

from dflare import ops
from dflare.ops.reference_math import apply_rope, rms_norm

EPS = 1e-6
MAX_POSITION = 4096
PADDING_SLOT = 0
DSPARK_WRITER = "kernels/ops/speculative/dspark/fused_kv_write.py"


@dataclass(frozen=True)
class Shape:
    """commits: --commit-lens, "none" where every row is context."""

    pair: Pair
    rows: int
    commits: str
    dtype: torch.dtype
    device: str

    @functools.cached_property
    def commit_lens(self) -> Tensor | None:
        """[bs] int32 on the device, the same for every buffer set."""
        blocks = self.rows // self.pair.block
        if self.commits == "none":
            return None
        if self.commits == "random":
            draw = torch.Generator().manual_seed(0)
            lens = torch.randint(1, self.pair.block + 1, (blocks,), generator=draw)
        else:
            each = self.pair.block if self.commits == "full" else int(self.commits)
            lens = torch.full((blocks,), each)
        return lens.to(self.device, torch.int32)

    @functools.cached_property
    def committed(self) -> int:
        return self.rows if self.commit_lens is None else int(self.commit_lens.sum())

    def valid(self) -> Tensor:
        """[rows] bool: the rows that count."""
        if self.commit_lens is None:
            return torch.ones(self.rows, dtype=torch.bool, device=self.device)
        return in_blocks(self.commit_lens, self.pair.block)

    def work(self) -> tuple[float, float]:
        """Fewest bytes through memory and operations, for the rows that count."""
        pair, rows = self.pair, self.committed
        width = 2 * pair.kv_heads * pair.head_dim
        weights = pair.layers * width * pair.hidden
        per_row = pair.taps * pair.hidden + pair.layers * width
        flops = 2 * rows * pair.layers * pair.hidden * (width + pair.taps)
        return self.dtype.itemsize * (weights + rows * per_row), flops

    def gemm_work(self) -> tuple[float, float]:
        """Of the batched GEMM alone: all rows, fused states in and K/V out."""
        pair = self.pair
        width = 2 * pair.kv_heads * pair.head_dim
        elements = pair.layers * (width * pair.hidden + self.rows * (pair.hidden + width))
        return self.dtype.itemsize * elements, 2 * self.rows * pair.layers * pair.hidden * width


def in_blocks(commit_lens: Tensor, block: int) -> Tensor:
    return (torch.arange(block, device=commit_lens.device) < commit_lens[:, None]).flatten()


def make_set(shape: Shape, draw: torch.Generator) -> dict[str, Any]:
    """Arguments of the op on buffers of their own; no token has the padding slot."""
    pair, rows, device = shape.pair, shape.rows, shape.device
    width, slots = 2 * pair.kv_heads * pair.head_dim, rows + 64

    def normal(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.randn(size, generator=draw, device=device, dtype=dtype)

    def pool() -> Tensor:
        return torch.zeros(slots, pair.kv_heads, pair.head_dim, device=device, dtype=shape.dtype)

    angles = torch.rand(MAX_POSITION, pair.head_dim // 2, generator=draw, device=device) * 6.28
    return {
        "target_hidden": normal(rows, pair.taps * pair.hidden),
        "fusion_probs": normal(pair.layers, pair.taps, dtype=torch.float32).softmax(-1),
        "norm_weight": normal(pair.hidden) / 4 + 1,
        "eps": EPS,
        "kv_weight": normal(pair.layers, width, pair.hidden).mul_(pair.hidden**-0.5),
        "kv_bias": None,
        "k_norm_weight": normal(pair.layers, pair.head_dim) / 4 + 1,
        "k_norm_eps": EPS,
        "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], 1),
        "positions": torch.randint(0, MAX_POSITION, (rows,), generator=draw, device=device),
        "cache_loc": torch.randperm(slots - 1, generator=draw, device=device)[:rows] + 1,
        "commit_lens": shape.commit_lens,
        "block_size": pair.block,
        "k_pools": [pool() for _ in range(pair.layers)],
        "v_pools": [pool() for _ in range(pair.layers)],
    }


def fuse(x: dict[str, Any]) -> Tensor:
    taps = x["fusion_probs"].shape[1]
    hidden = x["target_hidden"].unflatten(-1, (taps, -1))
    fused = torch.matmul(x["fusion_probs"].to(hidden.dtype), hidden)
    return rms_norm(fused, x["norm_weight"], x["eps"]).transpose(0, 1)


def project_and_write(x: dict[str, Any]) -> None:
    """The operator over all rows, so that torch.compile sees no data-dependence."""
    kv = torch.bmm(fuse(x), x["kv_weight"].transpose(1, 2))
    k, v = kv.unflatten(-1, (2, *x["k_pools"][0].shape[1:])).unbind(2)
    slots = x["cache_loc"]
    if x["commit_lens"] is not None:
        slots = torch.where(in_blocks(x["commit_lens"], x["block_size"]), slots, PADDING_SLOT)
    for layer in range(len(k)):
        normed = rms_norm(k[layer], x["k_norm_weight"][layer], x["k_norm_eps"])
        rotated = apply_rope(normed, x["cos_sin_cache"], x["positions"])
        x["k_pools"][layer].index_copy_(0, slots, rotated)
        x["v_pools"][layer].index_copy_(0, slots, v[layer])


def dspark_writer() -> Callable[..., None]:
    """Upstream's writer from its file: it needs Triton alone, importing SGLang far more."""
    sglang = importlib.util.find_spec("sglang")
    if sglang is None or not sglang.submodule_search_locations:
        raise ModuleNotFoundError("SGLang is not installed")
    path = Path(sglang.submodule_search_locations[0]) / DSPARK_WRITER
    spec = importlib.util.spec_from_file_location("dspark_fused_kv_write", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.fused_kv_norm_rope_write


def dspark_arm(sets: list[dict[str, Any]], shape: Shape) -> Arm:
    write, pair = dspark_writer(), shape.pair
    width = 2 * pair.kv_heads * pair.head_dim
    metas = []
    for x in sets:
        addresses = [
            [k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0)]
            for k, v in zip(x["k_pools"], x["v_pools"], strict=True)
        ]
        metas.append(torch.tensor(addresses, dtype=torch.int64, device=shape.device))

    def run(i: int) -> None:
        x = sets[i]
        kv = x["target_hidden"].new_empty(shape.rows, pair.layers, width)
        torch.bmm(fuse(x), x["kv_weight"].transpose(1, 2), out=kv.transpose(0, 1))
        write(
            kv.flatten(1),
            metas[i],
            x["k_norm_weight"],
            x["cos_sin_cache"],
            x["positions"],
            x["cache_loc"],
            pair.layers,
            width // 2,
            pair.head_dim,
            x["k_norm_eps"],
            commit_lens=x["commit_lens"],
            locs_row_width=None if x["commit_lens"] is None else pair.block,
        )

    return Arm("dspark", run, shape.work())


def make_arms(sets: list[dict[str, Any]], shape: Shape, names: list[str]) -> list[Arm]:
    def bmm_arm() -> Arm:
        fused = [fuse(x).contiguous() for x in sets]
        return Arm(
            "bmm",
            lambda i: torch.bmm(fused[i], sets[i]["kv_weight"].transpose(1, 2)),
            shape.gemm_work(),
            note="the GEMM alone, all rows",
        )

    compiled = torch.compile(project_and_write, dynamic=False)
    work = shape.work()
    waits = shape.commit_lens is not None
    makers: dict[str, Callable[[], Arm]] = {
        "dflare": lambda: Arm("dflare", lambda i: ops.append_context_kv(**sets[i]), work),
        "eager": lambda: Arm(
            "eager",
            lambda i: ops.append_context_kv_reference(**sets[i]),
            work,
            capturable=not waits,
            note="waits for the device" if waits else "",
        ),
        "compile": lambda: Arm("compile", lambda i: compiled(sets[i]), work),
        "dspark": lambda: dspark_arm(sets, shape),
        "bmm": bmm_arm,
    }
    return build(makers, names)
