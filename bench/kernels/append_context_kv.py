"""Benchmark of append_context_kv against PyTorch and the DSpark way of writing context K/V.

    python bench/kernels/append_context_kv.py --rows 16 64 256 1024 4096 > append.jsonl
    python bench/kernels/append_context_kv.py --device cpu --model smollm2-135m --dtype float32
    ncu --profile-from-start off python bench/kernels/append_context_kv.py --profile dflare

Arms: `dflare`; `eager`, the operator in plain PyTorch; `compile`, the same under torch.compile;
`dspark`, fusion and norm in PyTorch, one batched GEMM and SGLang's Triton norm-RoPE-write kernel
(ops/speculative/dspark/fused_kv_write.py); `bmm`, the batched GEMM alone.
"""

import argparse
from typing import Any

import torch
from measure import (
    Arm,
    buffer_sets,
    environment,
    measure_peaks,
    profile,
    relative_error,
    report,
    time_on_cpu,
    time_on_gpu,
)
from models import PAIRS, Pair
from torch import Tensor

from dflare import ops
from dflare.ops.reference_math import apply_rope, rms_norm

EPS = 1e-6
MAX_POSITION = 4096


def make_set(pair: Pair, rows: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of the op on buffers of their own."""
    width = 2 * pair.kv_heads * pair.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    angles = torch.rand(MAX_POSITION, pair.head_dim // 2, device=device) * 6.28
    pools = normal(2, pair.layers, rows + 64, pair.kv_heads, pair.head_dim)
    return {
        "target_hidden": normal(rows, pair.taps * pair.hidden),
        "fusion_probs": torch.randn(pair.layers, pair.taps, device=device).softmax(-1),
        "norm_weight": normal(pair.hidden) / 4 + 1,
        "eps": EPS,
        "kv_weight": normal(pair.layers, width, pair.hidden) * pair.hidden**-0.5,
        "kv_bias": None,
        "k_norm_weight": normal(pair.layers, pair.head_dim) / 4 + 1,
        "k_norm_eps": EPS,
        "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], 1),
        "positions": torch.randint(0, MAX_POSITION, (rows,), device=device),
        "cache_loc": torch.randperm(rows + 64, device=device)[:rows],
        "commit_lens": None,
        "block_size": pair.block,
        "k_pools": list(pools[0]),
        "v_pools": list(pools[1]),
    }


def work(pair: Pair, rows: int, element_size: int) -> tuple[float, float]:
    """Fewest bytes through memory and operations."""
    width = 2 * pair.kv_heads * pair.head_dim
    weights = pair.layers * width * pair.hidden
    per_row = pair.taps * pair.hidden + pair.layers * width
    flops = 2 * rows * pair.layers * pair.hidden * (width + pair.taps)
    return element_size * (weights + rows * per_row), flops


def written(x: dict[str, Any]) -> list[Tensor]:
    """K and V of all rows, [D, N, KV, hd]."""
    return [torch.stack([pool[x["cache_loc"]] for pool in x[name]]) for name in POOLS]


POOLS = ("k_pools", "v_pools")


def fuse(x: dict[str, Any]) -> Tensor:
    taps = x["fusion_probs"].shape[1]
    hidden = x["target_hidden"].unflatten(-1, (taps, -1))
    fused = torch.matmul(x["fusion_probs"].to(hidden.dtype), hidden)
    return rms_norm(fused, x["norm_weight"], x["eps"]).transpose(0, 1)


def project_and_write(x: dict[str, Any]) -> None:
    """The operator for rows that are all valid, so that torch.compile sees no data-dependence."""
    kv = torch.bmm(fuse(x), x["kv_weight"].transpose(1, 2))
    k, v = kv.unflatten(-1, (2, *x["k_pools"][0].shape[1:])).unbind(2)
    for layer in range(len(k)):
        normed = rms_norm(k[layer], x["k_norm_weight"][layer], x["k_norm_eps"])
        rotated = apply_rope(normed, x["cos_sin_cache"], x["positions"])
        x["k_pools"][layer].index_copy_(0, x["cache_loc"], rotated)
        x["v_pools"][layer].index_copy_(0, x["cache_loc"], v[layer])


def dspark_arm(sets: list[dict[str, Any]], pair: Pair) -> Arm | None:
    try:
        from sglang.kernels.ops.speculative.dspark.fused_kv_write import fused_kv_norm_rope_write
    except ImportError:
        return None
    width = 2 * pair.kv_heads * pair.head_dim
    metas = []
    for x in sets:
        rows = [
            [k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0)]
            for k, v in zip(x["k_pools"], x["v_pools"], strict=True)
        ]
        metas.append(torch.tensor(rows, dtype=torch.int64, device=x["positions"].device))

    def run(i: int) -> None:
        x = sets[i]
        rows = x["positions"].shape[0]
        kv = x["target_hidden"].new_empty(rows, pair.layers, width)
        torch.bmm(fuse(x), x["kv_weight"].transpose(1, 2), out=kv.transpose(0, 1))
        fused_kv_norm_rope_write(
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
        )

    return Arm("dspark", run)


def make_arms(sets: list[dict[str, Any]], pair: Pair, device: str) -> list[Arm]:
    compiled = torch.compile(project_and_write, dynamic=False)
    fused = [torch.randn_like(fuse(x)).contiguous() for x in sets]
    arms = [
        Arm("dflare", lambda i: ops.append_context_kv(**sets[i])),
        Arm("eager", lambda i: ops.append_context_kv_reference(**sets[i])),
        Arm("compile", lambda i: compiled(sets[i])),
        Arm(
            "bmm",
            lambda i: torch.bmm(fused[i], sets[i]["kv_weight"].transpose(1, 2)),
            note="the GEMM alone",
        ),
    ]
    if device == "cuda" and (dspark := dspark_arm(sets, pair)):
        arms.append(dspark)
    return arms


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--model", choices=PAIRS, nargs="+", default=["qwen3-4b"])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--refcheck", action="store_true", help="errors against float64")
    parser.add_argument("--profile", metavar="ARM", help="one call of one arm, no timing")
    arguments = parser.parse_args()
    if arguments.profile and arguments.device == "cpu":
        parser.error("--profile marks one call for ncu: it needs --device cuda")
    return arguments


def main() -> None:
    arguments = parse()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    peaks = None if arguments.profile else measure_peaks(device, dtype)
    setting = {} if arguments.profile else environment(device)
    for model in arguments.model:
        pair = PAIRS[model]
        for rows in arguments.rows:
            load = work(pair, rows, dtype.itemsize)
            count = buffer_sets(device, int(load[0]))
            sets = [make_set(pair, rows, dtype, device) for _ in range(count)]
            arms = make_arms(sets, pair, device)
            if arguments.arms:
                arms = [arm for arm in arms if arm.name in arguments.arms]
            if arguments.profile:
                profile(next(arm for arm in arms if arm.name == arguments.profile))
                continue
            if arguments.refcheck:
                refcheck([arm for arm in arms if arm.name != "bmm"], sets[0])
            (time_on_gpu if device == "cuda" else time_on_cpu)(arms, count, arguments.rounds)
            shape = {"model": model, "rows": rows, "dtype": arguments.dtype, "device": device}
            assert peaks
            report("append_context_kv", shape, arms, load, peaks, setting)
            del sets, arms
            torch._dynamo.reset()


def refcheck(arms: list[Arm], x: dict[str, Any]) -> None:
    """Errors of the arms on set 0, whose pools are poisoned before every call."""
    exact = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in x.items()
    }
    for name in POOLS:
        exact[name] = [pool.double() for pool in x[name]]
    ops.append_context_kv_reference(**exact)
    expected = written(exact)
    for arm in arms:
        for pool in (*x["k_pools"], *x["v_pools"]):
            pool.fill_(torch.nan)
        arm.run(0)
        arm.error = relative_error(written(x), expected)


if __name__ == "__main__":
    main()
