"""PyTorch's arms and dflare's own of the block_attention benchmark, and what they run on."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import Arm
from models import Pair
from torch import Tensor

from dflare import ops
from dflare.ops.reference_math import apply_rope, rms_norm

EPS = 1e-6
MAX_POSITION = 33 << 10
ATTENTION_ONLY = "attention only: without norm, RoPE and the block's K/V write"


@dataclass(frozen=True)
class Shape:
    pair: Pair
    batch: int
    context: int
    page: int
    dtype: torch.dtype
    device: str

    @property
    def tokens(self) -> int:
        """Slots a request takes: context and block, whole pages."""
        return -(-(self.context + self.pair.block) // self.page) * self.page

    @property
    def kv_bytes(self) -> int:
        pair = self.pair
        per_token = 2 * pair.kv_heads * pair.head_dim * self.dtype.itemsize
        return self.batch * self.tokens * per_token

    def work(self) -> tuple[float, float]:
        """Fewest bytes through memory and operations.

        Of the operator (qkv in, output out) and of attention alone (q and the block's K/V in,
        output out), which move as much.
        """
        pair, rows = self.pair, self.batch * self.pair.block
        columns = 2 * pair.heads + 2 * pair.kv_heads
        context = self.batch * self.context * 2 * pair.kv_heads
        moved = (context + rows * columns) * pair.head_dim * self.dtype.itemsize
        keys = self.context + pair.block
        return moved, 4 * rows * pair.heads * keys * pair.head_dim

    def prologue_work(self) -> tuple[float, float]:
        """Bytes of norm, RoPE and the block's K/V write: qkv in, q, K and V out."""
        pair, rows = self.pair, self.batch * self.pair.block
        columns = 2 * pair.heads + 4 * pair.kv_heads
        return rows * columns * pair.head_dim * self.dtype.itemsize, 0


def make_set(shape: Shape, draw: torch.Generator, cos_sin_cache: Tensor) -> dict[str, Any]:
    """Arguments of the op on a cache of its own; block tokens have slots for the baselines."""
    pair, device, batch = shape.pair, shape.device, shape.batch

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device=device, dtype=shape.dtype)

    pages_each = shape.tokens // shape.page
    pages = torch.randperm(batch * pages_each, generator=draw, device=device, dtype=torch.int32)
    pages = pages.view(batch, pages_each)
    offsets = torch.arange(shape.page, device=device, dtype=torch.int32)
    table = (pages[..., None] * shape.page + offsets).flatten(1)
    return {
        "qkv": normal(batch * pair.block, (pair.heads + 2 * pair.kv_heads) * pair.head_dim),
        "q_norm_weight": torch.ones(pair.head_dim, device=device, dtype=shape.dtype),
        "k_norm_weight": torch.ones(pair.head_dim, device=device, dtype=shape.dtype),
        "eps": EPS,
        "cos_sin_cache": cos_sin_cache,
        "positions": (shape.context + torch.arange(pair.block, device=device)).repeat(batch),
        "k_pool": normal(batch * shape.tokens, pair.kv_heads, pair.head_dim),
        "v_pool": normal(batch * shape.tokens, pair.kv_heads, pair.head_dim),
        "req_to_token": table,
        "req_pool_indices": torch.arange(batch, device=device),
        "seq_lens": torch.full((batch,), shape.context, device=device),
        "block_size": pair.block,
        "window": -1,
        "causal": False,
        "scale": pair.head_dim**-0.5,
    }


def make_sets(shape: Shape, count: int) -> list[dict[str, Any]]:
    """Buffer sets that share the cosines and sines, as layers of a model do."""
    draw = torch.Generator(shape.device).manual_seed(0)
    size = MAX_POSITION, shape.pair.head_dim // 2
    angles = torch.rand(size, generator=draw, device=shape.device) * 6.28
    cos_sin_cache = torch.cat([angles.cos(), angles.sin()], 1)
    return [make_set(shape, draw, cos_sin_cache) for _ in range(count)]


def split_heads(x: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the block; q and k normalised and rotated."""
    kv_heads, head_dim = x["k_pool"].shape[1:]
    heads = x["qkv"].unflatten(1, (-1, head_dim))
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    q = apply_rope(rms_norm(q, x["q_norm_weight"], EPS), x["cos_sin_cache"], x["positions"])
    k = apply_rope(rms_norm(k, x["k_norm_weight"], EPS), x["cos_sin_cache"], x["positions"])
    return q, k, v


def gather_and_attend(x: dict[str, Any], context: int) -> Tensor:
    """All requests have the same context length, so that this needs no loop over them."""
    batch, block = x["seq_lens"].shape[0], x["block_size"]
    q, k, v = (t.unflatten(0, (batch, block)) for t in split_heads(x))
    slots = x["req_to_token"][:, :context].long()
    keys, values = (
        torch.cat([pool[slots], own], 1).transpose(1, 2)
        for pool, own in ((x["k_pool"], k), (x["v_pool"], v))
    )
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, scale=x["scale"], enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def prologue(x: dict[str, Any], slots: Tensor) -> Tensor:
    """What a stock backend needs before attention: the block's K/V go to the pool."""
    q, k, v = split_heads(x)
    x["k_pool"].index_copy_(0, slots, k)
    x["v_pool"].index_copy_(0, slots, v)
    return q


class BlockInputs:
    """What the baselines are given of each buffer set, made when the first of them asks."""

    def __init__(self, sets: list[dict[str, Any]], shape: Shape) -> None:
        self.sets = sets
        self.shape = shape

    @functools.cached_property
    def slots(self) -> list[Tensor]:
        """Slots of the block's tokens, [batch * block] int64."""
        first, end = self.shape.context, self.shape.context + self.shape.pair.block
        return [x["req_to_token"][:, first:end].flatten().long() for x in self.sets]

    @functools.cached_property
    def queries(self) -> list[Tensor]:
        """Normalised and rotated, [batch * block, HQ, hd]; the pools get the block's K/V."""
        return [prologue(x, slots) for x, slots in zip(self.sets, self.slots, strict=True)]


def schedule_of(x: dict[str, Any], shape: Shape) -> Tensor:
    pair = shape.pair
    return ops.block_attention_schedule(
        x["seq_lens"], pair.block, pair.heads, pair.kv_heads, pair.head_dim, x["window"]
    )


def dflare_arm(sets: list[dict[str, Any]], shape: Shape) -> Arm:
    on_gpu = shape.device == "cuda"
    schedules = [schedule_of(x, shape) if on_gpu else None for x in sets]
    return Arm(
        "dflare", lambda i: ops.block_attention(**sets[i], schedule=schedules[i]), shape.work()
    )


def compiled_arm(sets: list[dict[str, Any]], shape: Shape) -> Arm:
    compiled = torch.compile(gather_and_attend, dynamic=False)
    return Arm("compile", lambda i: compiled(sets[i], shape.context), shape.work())


def prologue_arm(inputs: BlockInputs) -> Arm:
    """Compiled once for all contexts: the length of the pools is left open."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or it would silently run eagerly
    compiled = torch.compile(prologue, dynamic=False)
    for x in inputs.sets:
        for pool in (x["k_pool"], x["v_pool"]):
            torch._dynamo.maybe_mark_dynamic(pool, 0)
    return Arm(
        "prologue",
        lambda i: compiled(inputs.sets[i], inputs.slots[i]),
        inputs.shape.prologue_work(),
        note="for stock backends",
    )


def own_makers(inputs: BlockInputs) -> dict[str, Callable[[], Arm]]:
    """Of all arms but the libraries'."""
    sets, shape = inputs.sets, inputs.shape
    return {
        "dflare": lambda: dflare_arm(sets, shape),
        "schedule": lambda: Arm(
            "schedule", lambda i: schedule_of(sets[i], shape), note="once a step, for all layers"
        ),
        "eager": lambda: Arm(
            "eager", lambda i: gather_and_attend(sets[i], shape.context), shape.work()
        ),
        "compile": lambda: compiled_arm(sets, shape),
        "prologue": lambda: prologue_arm(inputs),
    }
