"""append_context_kv: the operator, PyTorch's ways and DSpark's way to write context K/V.

Arms: `dflare`; `wgmma`, the operator with the projection that sm_90 alone can run; `eager`, the
reference in plain PyTorch, which waits for the device to pick out the committed rows; `compile`,
all rows under torch.compile, those that do not count to a padding slot; `dspark`, fusion and norm
in PyTorch, one batched GEMM and SGLang's Triton norm-RoPE-write kernel, which stores bfloat16
alone; `bmm`, the batched GEMM alone, over all rows.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.kernels.timing import Arm, Case, asked_for, buffer_sets, kept_going, relative_error
from dflare import ops
from dflare.ops.reference_math import apply_rope, rms_norm

ARMS = ("dflare", "wgmma", "eager", "compile", "dspark", "bmm")
EPS = 1e-6
MAX_POSITION = 4096
PADDING_SLOT = 0
DSPARK_WRITER = "kernels/ops/speculative/dspark/fused_kv_write.py"
Inputs = dict[str, Any]


def commit_lens(kind: str, blocks: int, block: int, device: str) -> Tensor | None:
    """[blocks] int32: random lengths, all full, or a number of rows of each; None for `none`."""
    if kind == "none":
        return None
    if kind == "random":
        draw = torch.Generator().manual_seed(0)
        lens = torch.randint(1, block + 1, (blocks,), generator=draw)
    else:
        lens = torch.full((blocks,), block if kind == "full" else int(kind))
    return lens.to(device, torch.int32)


def call(op: Callable[..., None], x: Inputs) -> None:
    """The operator or its reference on a set of buffers."""
    weights = ops.ContextWeights(*(x[name] for name in ops.ContextWeights._fields))
    names = ("cos_sin_cache", "positions", "cache_loc", "commit_lens", "block_size")
    rest = (x[name] for name in names)
    op(x["target_hidden"], weights, *rest, ops.Pools(x["k_pools"], x["v_pools"]))


def counted(x: Inputs) -> Tensor:
    """[rows] bool: the rows that are to be written."""
    if x["commit_lens"] is None:
        return torch.ones_like(x["positions"], dtype=torch.bool)
    offsets = torch.arange(x["block_size"], device=x["positions"].device)
    return (offsets < x["commit_lens"][:, None]).flatten()


def make_set(pair: Any, rows: int, lens: Tensor | None, dtype: torch.dtype, device: str) -> Inputs:
    """Arguments of the operator on buffers of their own; no token has the padding slot."""
    width, slots = 2 * pair.kv_heads * pair.head_dim, rows + 64

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    def pools() -> list[Tensor]:
        return [normal(slots, pair.kv_heads, pair.head_dim) for _ in range(pair.layers)]

    angles = torch.rand(MAX_POSITION, pair.head_dim // 2, device=device) * 6.28
    return {
        "target_hidden": normal(rows, pair.taps * pair.hidden),
        "fusion_probs": torch.randn(pair.layers, pair.taps, device=device).softmax(-1),
        "norm_weight": normal(pair.hidden) / 4 + 1,
        "eps": EPS,
        "kv_weight": normal(pair.layers, width, pair.hidden).mul_(pair.hidden**-0.5),
        "kv_bias": None,
        "k_norm_weight": normal(pair.layers, pair.head_dim) / 4 + 1,
        "k_norm_eps": EPS,
        "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], 1),
        "positions": torch.randint(0, MAX_POSITION, (rows,), device=device),
        "cache_loc": torch.randperm(slots - 1, device=device)[:rows] + 1,
        "commit_lens": lens,
        "block_size": pair.block,
        "k_pools": pools(),
        "v_pools": pools(),
    }


def fuse(x: Inputs) -> Tensor:
    """[D, rows, H]: the normalised mix of each layer."""
    hidden = x["target_hidden"].unflatten(-1, (x["fusion_probs"].shape[1], -1))
    fused = torch.matmul(x["fusion_probs"].to(hidden.dtype), hidden)
    return rms_norm(fused, x["norm_weight"], x["eps"]).transpose(0, 1)


def project_and_write(x: Inputs) -> None:
    """The operator over all rows, so that torch.compile sees no data-dependence."""
    kv = torch.bmm(fuse(x), x["kv_weight"].transpose(1, 2))
    k, v = kv.unflatten(-1, (2, *x["k_pools"][0].shape[1:])).unbind(2)
    slots = torch.where(counted(x), x["cache_loc"], PADDING_SLOT)
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


def dspark_arm(sets: list[Inputs], work: tuple[float, float]) -> Arm:
    write = dspark_writer()
    if sets[0]["target_hidden"].dtype != torch.bfloat16:
        raise ValueError("its writer stores bfloat16 whatever the pool is")
    layers, width = sets[0]["kv_weight"].shape[:2]
    head_dim = sets[0]["k_pools"][0].shape[2]
    metas = []
    for x in sets:
        pools = zip(x["k_pools"], x["v_pools"], strict=True)
        addresses = [[k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0)] for k, v in pools]
        metas.append(torch.tensor(addresses, device=x["target_hidden"].device))

    def run(i: int) -> None:
        x = sets[i]
        kv = x["target_hidden"].new_empty(len(x["positions"]), layers, width)
        torch.bmm(fuse(x), x["kv_weight"].transpose(1, 2), out=kv.transpose(0, 1))
        names = ("k_norm_weight", "cos_sin_cache", "positions", "cache_loc")
        write(
            *(kv.flatten(1), metas[i], *(x[name] for name in names)),
            *(layers, width // 2, head_dim, x["k_norm_eps"]),
            commit_lens=x["commit_lens"],
            locs_row_width=None if x["commit_lens"] is None else x["block_size"],
        )

    return Arm("dspark", run, work)


def bmm_arm(sets: list[Inputs], work: tuple[float, float]) -> Arm:
    fused = [fuse(x).contiguous() for x in sets]

    def run(i: int) -> Tensor:
        return torch.bmm(fused[i], sets[i]["kv_weight"].transpose(1, 2))

    return Arm("bmm", run, work, note="the GEMM alone, all rows")


def wgmma_arm(sets: list[Inputs], work: tuple[float, float]) -> Arm:
    capability = torch.cuda.get_device_capability(sets[0]["target_hidden"].device)
    if capability[0] != 9:
        raise ValueError("compute capability {}.{}, needs 9.0".format(*capability))

    def run(i: int) -> None:
        with asked_for("DFLARE_WGMMA"):
            call(ops.append_context_kv, sets[i])

    return Arm("wgmma", run, work)


def compiled_arm(sets: list[Inputs], work: tuple[float, float]) -> Arm:
    torch._dynamo.reset()  # or the shapes before this one count towards the limit of recompiling
    compiled = torch.compile(project_and_write, dynamic=False)
    return Arm("compile", lambda i: compiled(sets[i]), work)


def case(
    pair: Any, rows: int, commits: str, dtype: torch.dtype, device: str, cold: bool = True
) -> Case:
    """The operator with so many rows, of which those count that a verification committed.

    Raises:
        ValueError: committed rows of blocks, but the rows are no whole blocks.
    """
    if commits != "none" and rows % pair.block:
        raise ValueError(f"{rows} rows: expected a multiple of the block size {pair.block}")
    torch.manual_seed(0)
    lens = commit_lens(commits, rows // pair.block, pair.block, device)
    committed = rows if lens is None else int(lens.sum())
    width = 2 * pair.kv_heads * pair.head_dim
    weights = pair.layers * width * pair.hidden
    moved = weights + committed * (pair.taps * pair.hidden + pair.layers * width)
    flops = 2 * committed * pair.layers * pair.hidden * (width + pair.taps)
    work = dtype.itemsize * moved, flops
    moved_by_gemm = weights + rows * pair.layers * (pair.hidden + width)
    gemm = dtype.itemsize * moved_by_gemm, 2 * rows * weights
    count = buffer_sets(device, work[0]) if cold else 1
    sets = [make_set(pair, rows, lens, dtype, device) for _ in range(count)]
    makers: dict[str, Callable[[], Arm]] = {
        "dflare": lambda: Arm("dflare", lambda i: call(ops.append_context_kv, sets[i]), work),
        "wgmma": lambda: wgmma_arm(sets, work),
        "eager": lambda: Arm(
            "eager",
            lambda i: call(ops.append_context_kv_reference, sets[i]),
            work,
            graph=lens is None,
        ),
        "compile": lambda: compiled_arm(sets, work),
        "dspark": lambda: dspark_arm(sets, work),
        "bmm": lambda: bmm_arm(sets, gemm),
    }
    shape = {"rows": rows, "commit_lens": commits, "committed": committed}
    return Case("append_context_kv", shape, makers, functools.partial(check, sets[0]), count)


def written(x: Inputs, rows: Tensor) -> list[Tensor]:
    """K and V of these rows, [D, n, KV, hd]."""
    slots = x["cache_loc"][rows]
    return [torch.stack([pool[slots] for pool in x[name]]) for name in ("k_pools", "v_pools")]


def check(x: Inputs, arms: list[Arm]) -> None:
    """Give the arms their errors, infinite for one that writes to the slot of another row.

    Pools are poisoned before every call, and so are rows that do not count.
    """
    valid, pools = counted(x), (*x["k_pools"], *x["v_pools"])
    states = x["target_hidden"].clone()
    x["target_hidden"][~valid] = torch.nan
    exact: Inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in x.items()
    }
    for name in ("k_pools", "v_pools"):
        exact[name] = [pool.double() for pool in x[name]]
    call(ops.append_context_kv_reference, exact)
    expected, untouched = written(exact, valid), x["cache_loc"][~valid]
    for arm in arms:
        if arm.name == "bmm":
            continue
        with kept_going(arm):
            for pool in pools:
                pool.fill_(torch.nan)
            arm.run(0)
            arm.error = relative_error(written(x, valid), expected)
            if not all(pool[untouched].isnan().all() for pool in pools):
                arm.error = float("inf")
    for pool in pools:
        pool.zero_()
    x["target_hidden"].copy_(states)
