"""Benchmark of append_context_kv against PyTorch and the DSpark way of writing context K/V.

    python bench/kernels/append_context_kv.py --rows 16 64 256 1024 4096 > append.jsonl
    python bench/kernels/append_context_kv.py --rows 64 256 512 640 768 --commit-lens random full
    python bench/kernels/append_context_kv.py --device cpu --model smollm2-135m --dtype float32
    ncu --profile-from-start off python bench/kernels/append_context_kv.py --profile dflare

Arms: `dflare`; `eager`, the operator in plain PyTorch; `compile`, the same under torch.compile;
`dspark`, fusion and norm in PyTorch, one batched GEMM and SGLang's Triton norm-RoPE-write kernel
(ops/speculative/dspark/fused_kv_write.py), which writes bfloat16 alone; `bmm`, the batched GEMM
alone. With --commit-lens only the committed rows of each block count, as after a verification;
bytes and operations are then theirs. `eager` picks them out, for which it waits for the device;
`compile`, `dspark` and `bmm` compute all rows, and `compile` writes the others to the padding slot.
"""

import argparse
import functools
import sys
from typing import Any

import torch
from append_arms import Shape, make_arms, make_set
from device import buffer_sets
from measure import Arm, kept_going, relative_error
from models import PAIRS
from options import add_options, check_options, leave_out
from session import Session
from torch import Tensor

from dflare import ops

ARMS = ("dflare", "eager", "compile", "dspark", "bmm")


def written(x: dict[str, Any], valid: Tensor) -> list[Tensor]:
    """K and V of the rows that count, [D, n, KV, hd]."""
    slots = x["cache_loc"][valid]
    return [torch.stack([pool[slots] for pool in x[name]]) for name in ("k_pools", "v_pools")]


def refcheck(arms: list[Arm], x: dict[str, Any], shape: Shape) -> None:
    """Errors of the arms on set 0, infinite for one that writes to the slot of another row.

    Pools are poisoned before every call, and so are rows that do not count.
    """
    valid = shape.valid()
    states = x["target_hidden"].clone()
    x["target_hidden"][~valid] = torch.nan
    exact: dict[str, Any] = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in x.items()
    }
    pools = (*x["k_pools"], *x["v_pools"])
    for name in ("k_pools", "v_pools"):
        exact[name] = [pool.double() for pool in x[name]]
    ops.append_context_kv_reference(**exact)
    expected = written(exact, valid)
    untouched = x["cache_loc"][~valid]
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
    x["target_hidden"].copy_(states)


def parse(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, ARMS)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument(
        "--commit-lens",
        nargs="+",
        default=["none"],
        metavar="KIND",
        help="committed rows of each block: none (no blocks, every row counts), full, random or N",
    )
    arguments = parser.parse_args(command)
    check_options(parser, arguments)
    if arguments.device == "cpu":
        leave_out(parser, arguments, ["dspark"], "its writer is a Triton kernel")
    if arguments.dtype == "float16":
        leave_out(parser, arguments, ["dspark"], "its writer stores bfloat16 whatever the pool is")
    for kind in arguments.commit_lens:
        for model in arguments.model:
            block = PAIRS[model].block
            known = kind in ("none", "full", "random") or kind.isdecimal()
            if not known or (kind.isdecimal() and not 1 <= int(kind) <= block):
                parser.error(
                    f"--commit-lens {kind}: expected none, full, random or 1 to {block}, the block "
                    f"size of {model}"
                )
            odd = [rows for rows in arguments.rows if kind != "none" and rows % block]
            if odd:
                parser.error(f"--rows {odd[0]}: with --commit-lens a multiple of {block} ({model})")
    return arguments


def run_shape(session: Session, shape: Shape, model: str) -> None:
    arguments = session.arguments
    draw = torch.Generator(shape.device).manual_seed(0)
    count = 1 if arguments.profile else buffer_sets(shape.device, int(shape.work()[0]))
    sets = [make_set(shape, draw) for _ in range(count)]
    named = {
        "model": model,
        "rows": shape.rows,
        "commit_lens": shape.commits,
        "committed": shape.committed,
        "dtype": arguments.dtype,
        "device": shape.device,
    }
    arms = make_arms(sets, shape, arguments.arms)
    session.arms(arms, count, named, lambda arms: refcheck(arms, sets[0], shape))


def main(command: list[str] | None = None) -> int:
    arguments = parse(command)
    session = Session("append_context_kv", arguments)
    dtype = getattr(torch, arguments.dtype)
    for model in arguments.model:
        for commits in arguments.commit_lens:
            for rows in arguments.rows:
                shape = Shape(PAIRS[model], rows, commits, dtype, arguments.device)
                label = f"{model}, {rows} rows, commit lens {commits}"
                session.shape(label, functools.partial(run_shape, session, shape, model))
    return session.status()


if __name__ == "__main__":
    sys.exit(main())
