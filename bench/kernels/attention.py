"""block_attention: the operator, PyTorch's ways, and what stock backends need besides attention.

Arms: `dflare`, one layer with the schedule made before; `cluster`, the same with parts merged in
clusters of blocks; `wgmma`, the same by sm_90's products of warpgroups, for groups of more than 64
rows; `schedule`, that schedule, once a step;
`eager`, norm and RoPE in PyTorch, gather, scaled_dot_product_attention; `compile`, the same under
torch.compile; `prologue`, what the libraries' arms (libraries.py) leave out: norm, RoPE and the
block's K/V write; `gemm`, the QKV projection that comes before; `gemm+dflare` and `gemm+fa3`, the
two together: attention launched behind attention overlaps more than it does in a model.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels import libraries
from bench.kernels.timing import Arm, Case, asked_for, buffer_sets, kept_going, relative_error
from dflare import ops
from dflare.ops.reference_math import apply_rope, rms_norm

ARMS = (
    "dflare",
    "cluster",
    "wgmma",
    "schedule",
    "eager",
    "compile",
    "prologue",
    "gemm",
    "gemm+dflare",
    "gemm+fa3",
)
ARMS += libraries.ARMS
# No output to compare, or that of another mask.
UNCHECKED = ("schedule", "prologue", "gemm", "gemm+dflare", "gemm+fa3", "flashinfer_uniform")
EPS = 1e-6
MAX_POSITION = 33 << 10


@dataclass
class Inputs:
    """Sets of the operator's arguments, and what they have in common.

    Attributes:
        sets: arguments, each on a cache of its own; block tokens have slots for the baselines.
        tokens: slots a request takes: context and block, whole pages.
    """

    pair: Any
    batch: int
    context: int
    page: int
    dtype: torch.dtype
    device: str
    sets: list[dict[str, Any]]

    @functools.cached_property
    def tokens(self) -> int:
        return -(-(self.context + self.pair.block) // self.page) * self.page

    @functools.cached_property
    def slots(self) -> list[Tensor]:
        """Slots of the block's tokens, [batch * block] int64."""
        first, end = self.context, self.context + self.pair.block
        return [x["req_to_token"][:, first:end].flatten().long() for x in self.sets]

    @functools.cached_property
    def queries(self) -> list[Tensor]:
        """Normalised and rotated, [batch * block, HQ, hd]; the pools get the block's K/V."""
        return [prologue(x, slots) for x, slots in zip(self.sets, self.slots, strict=True)]

    @property
    def work(self) -> tuple[float, float]:
        """Fewest bytes and operations, of the operator (qkv in, output out) and of attention alone
        (q and the block's K/V in, output out), which move as much."""
        pair, rows = self.pair, self.batch * self.pair.block
        context = self.batch * self.context * 2 * pair.kv_heads
        moved = (context + rows * (2 * pair.heads + 2 * pair.kv_heads)) * pair.head_dim
        keys = self.context + pair.block
        return moved * self.dtype.itemsize, 4 * rows * pair.heads * keys * pair.head_dim

    def make_set(self, cos_sin_cache: Tensor) -> dict[str, Any]:
        pair, device, batch = self.pair, self.device, self.batch

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=self.dtype)

        pages_each = self.tokens // self.page
        pages = torch.randperm(batch * pages_each, device=device, dtype=torch.int32)
        offsets = torch.arange(self.page, device=device, dtype=torch.int32)
        table = (pages.view(batch, pages_each, 1) * self.page + offsets).flatten(1)
        return {
            "qkv": normal(batch * pair.block, (pair.heads + 2 * pair.kv_heads) * pair.head_dim),
            "q_norm_weight": torch.ones(pair.head_dim, device=device, dtype=self.dtype),
            "k_norm_weight": torch.ones(pair.head_dim, device=device, dtype=self.dtype),
            "cos_sin_cache": cos_sin_cache,
            "positions": (self.context + torch.arange(pair.block, device=device)).repeat(batch),
            "k_pool": normal(batch * self.tokens, pair.kv_heads, pair.head_dim),
            "v_pool": normal(batch * self.tokens, pair.kv_heads, pair.head_dim),
            "req_to_token": table,
            "req_pool_indices": torch.arange(batch, device=device),
            "seq_lens": torch.full((batch,), self.context, device=device),
            "block_size": pair.block,
            "window": -1,
            "causal": False,
            "scale": pair.head_dim**-0.5,
        }


def call(op: Callable[..., Tensor], x: dict[str, Any], **schedule: Tensor | None) -> Tensor:
    """The operator or its reference on a set of buffers."""
    norms = ops.BlockNorms(x["q_norm_weight"], x["k_norm_weight"], EPS)
    context = ops.PagedContext(*(x[name] for name in ops.PagedContext._fields))
    settings = (x[name] for name in ("block_size", "window", "causal", "scale"))
    rotation = x["cos_sin_cache"], x["positions"]
    return op(x["qkv"], norms, *rotation, context, *settings, **schedule)


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


# Compiled once for all shapes: inductor takes longer than a case.
compiled_prologue = torch.compile(prologue, dynamic=True)


def own_makers(inputs: Inputs) -> dict[str, Callable[[], Arm]]:
    """Of all arms but the libraries'."""
    sets, pair, work = inputs.sets, inputs.pair, inputs.work

    def schedule(i: int) -> Tensor:
        sizes = pair.block, pair.heads, pair.kv_heads, pair.head_dim, sets[i]["window"]
        return ops.block_attention_schedule(sets[i]["seq_lens"], *sizes)

    def dflare() -> Arm:
        on_gpu = inputs.device == "cuda"
        made = [schedule(i) if on_gpu else None for i in range(len(sets))]
        return Arm("dflare", lambda i: call(ops.block_attention, sets[i], schedule=made[i]), work)

    def clustered() -> Arm:
        capability = torch.cuda.get_device_capability(sets[0]["qkv"].device)
        if capability[0] not in (9, 10):
            raise ValueError("compute capability {}.{}, needs 9.0 or 10.0".format(*capability))
        with asked_for("DFLARE_CLUSTER"):
            made = [schedule(i) for i in range(len(sets))]

        def run(i: int) -> Tensor:
            with asked_for("DFLARE_CLUSTER"):
                return call(ops.block_attention, sets[i], schedule=made[i])

        return Arm("cluster", run, work)

    def warpgroups() -> Arm:
        capability = torch.cuda.get_device_capability(sets[0]["qkv"].device)
        if capability[0] != 9:
            raise ValueError("compute capability {}.{}, needs 9.0".format(*capability))
        group = pair.heads // pair.kv_heads
        if group * pair.block <= 64 or pair.head_dim != 128:
            raise ValueError("needs more than 64 rows a KV head, of 128 elements")
        made = [schedule(i) for i in range(len(sets))]

        def run(i: int) -> Tensor:
            with asked_for("DFLARE_WGMMA"):
                return call(ops.block_attention, sets[i], schedule=made[i])

        return Arm("wgmma", run, work)

    def compiled() -> Arm:
        torch._dynamo.reset()
        attend = torch.compile(gather_and_attend, dynamic=False)
        return Arm("compile", lambda i: attend(sets[i], inputs.context), work)

    def behind_gemm(name: str, attention: Callable[[], Arm] | None) -> Arm:
        """QKV projection, then attention if there is one."""
        rows, columns = sets[0]["qkv"].shape
        x = torch.randn(rows, pair.hidden, device=inputs.device, dtype=inputs.dtype)
        weight = torch.randn(pair.hidden, columns, device=inputs.device, dtype=inputs.dtype)
        out, attend = torch.empty_like(sets[0]["qkv"]), attention().run if attention else None

        def run(i: int) -> None:
            torch.mm(x, weight, out=out)
            if attend:
                attend(i)

        return Arm(name, run, note="with the projection before it" if attend else "")

    def prologue_arm() -> Arm:
        rows, columns = sets[0]["qkv"].shape
        moved = rows * (columns + 2 * pair.kv_heads * pair.head_dim) * inputs.dtype.itemsize
        return Arm("prologue", lambda i: compiled_prologue(sets[i], inputs.slots[i]), (moved, 0))

    return {
        "dflare": dflare,
        "cluster": clustered,
        "wgmma": warpgroups,
        "schedule": lambda: Arm("schedule", schedule, note="once a step, for all layers"),
        "eager": lambda: Arm("eager", lambda i: gather_and_attend(sets[i], inputs.context), work),
        "compile": compiled,
        "prologue": prologue_arm,
        "gemm": lambda: behind_gemm("gemm", None),
        "gemm+dflare": lambda: behind_gemm("gemm+dflare", dflare),
        "gemm+fa3": lambda: behind_gemm("gemm+fa3", lambda: libraries.fa3_arm(inputs)),
    }


def case(
    pair: Any, batch: int, context: int, page: int, dtype: torch.dtype, device: str, cold=True
) -> Case:
    """A layer's attention of so many requests with so much context each."""
    torch.manual_seed(0)
    inputs = Inputs(pair, batch, context, page, dtype, device, [])
    count = buffer_sets(device, inputs.work[0]) if cold else 1
    angles = torch.rand(MAX_POSITION, pair.head_dim // 2, device=device) * 6.28
    shared = torch.cat([angles.cos(), angles.sin()], 1)  # as the layers of a model do
    inputs.sets = [inputs.make_set(shared) for _ in range(count)]
    makers = own_makers(inputs) | libraries.makers(inputs)
    shape = {"batch": batch, "context": context, "page": page, "layers": pair.layers}
    return Case("block_attention", shape, makers, functools.partial(check, inputs.sets[0]), count)


def check(x: dict[str, Any], arms: list[Arm]) -> None:
    """Give the arms their errors, over some requests: float64 of a large batch would not fit."""
    batch, context, block = len(x["seq_lens"]), int(x["seq_lens"][0]), x["block_size"]
    device = x["qkv"].device
    requests = sorted({0, 1, batch // 2, batch - 1} & set(range(batch)))
    first = torch.tensor(requests, device=device)[:, None] * block
    rows = (first + torch.arange(block, device=device)).flatten()
    slots = x["req_to_token"][requests, :context].long().flatten()
    exact = dict(x)
    for name in ("q_norm_weight", "k_norm_weight", "cos_sin_cache"):
        exact[name] = x[name].double()
    exact["qkv"], exact["positions"] = x["qkv"][rows].double(), x["positions"][rows]
    exact["k_pool"], exact["v_pool"] = (x[name][slots].double() for name in ("k_pool", "v_pool"))
    table = torch.arange(len(slots), dtype=torch.int32, device=device)
    exact["req_to_token"] = table.view(len(requests), context)
    exact["req_pool_indices"] = torch.arange(len(requests), device=device)
    exact["seq_lens"] = x["seq_lens"][requests]
    expected = call(ops.block_attention_reference, exact)
    for arm in arms:
        if arm.name not in UNCHECKED:
            with kept_going(arm):
                arm.error = relative_error([arm.run(0)[rows]], [expected])
