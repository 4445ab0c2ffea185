"""Benchmark of block_attention against PyTorch, FlashInfer and FlashAttention 3.

    python bench/kernels/block_attention.py --batch 1 8 32 --context 1024 4096 > attention.jsonl
    python bench/kernels/block_attention.py --device cpu --model smollm2-135m --dtype float32
    ncu --profile-from-start off python bench/kernels/block_attention.py --profile dflare ...

Arms: `dflare`, one layer with the schedule made before; `schedule`, that schedule, once a step;
`eager`, norm and RoPE in PyTorch, gather, scaled_dot_product_attention; `compile`, the same under
torch.compile; `fa3`, SGLang's FlashAttention 3; `flashinfer_fa2` and `flashinfer_fa3`, the paged
prefill wrapper with its plan made before; `flashinfer_uniform`, its decode wrapper, which knows
that all queries are equally long but masks causally; `prologue`, what those four leave out: norm,
RoPE and the block's K/V write (torch.compile). A plan is host work: field plan_us of its arms.

Each shape ends with the time of a layer: kernel, what it leaves out, and its share of what is made
once a step (targets.py).
"""

import argparse
import functools
import sys
from typing import Any

import torch
from attention_arms import MAX_POSITION, BlockInputs, Shape, make_sets, own_makers
from device import buffer_sets
from library_arms import library_makers
from measure import Arm, build, kept_going, relative_error
from models import PAIRS
from options import add_options, check_options, leave_out
from session import Session
from targets import LIBRARIES, Line, layer_times
from torch import Tensor

from dflare import ops

ARMS = ("dflare", "schedule", "eager", "compile", "prologue", *LIBRARIES)
UNCHECKED = ("schedule", "prologue", "flashinfer_uniform")  # no output, or that of another mask


def some_requests(batch: int) -> list[int]:
    """Those whose results are checked: float64 of a large batch would not fit."""
    return sorted({0, 1, batch // 2, batch - 1} & set(range(batch)))


def reference(x: dict[str, Any], requests: list[int]) -> Tensor:
    """Results of these requests in float64, [len(requests) * block, HQ * hd]."""
    context, block = int(x["seq_lens"][0]), x["block_size"]
    device = x["qkv"].device
    slots = x["req_to_token"][requests, :context].long().flatten()
    rows = rows_of(x, requests)
    exact = dict(x)
    for name in ("q_norm_weight", "k_norm_weight", "cos_sin_cache"):
        exact[name] = x[name].double()
    exact["qkv"], exact["positions"] = x["qkv"][rows].double(), x["positions"][rows]
    exact["k_pool"], exact["v_pool"] = (x[name][slots].double() for name in ("k_pool", "v_pool"))
    table = torch.arange(len(slots), dtype=torch.int32, device=device)
    exact["req_to_token"] = table.view(len(requests), context)
    exact["req_pool_indices"] = torch.arange(len(requests), device=device)
    exact["seq_lens"] = x["seq_lens"][requests]
    out = ops.block_attention_reference(**exact)
    assert len(out) == len(requests) * block
    return out


def rows_of(x: dict[str, Any], requests: list[int]) -> Tensor:
    first = torch.tensor(requests, device=x["qkv"].device)[:, None] * x["block_size"]
    return (first + torch.arange(x["block_size"], device=x["qkv"].device)).flatten()


def refcheck(x: dict[str, Any], arms: list[Arm]) -> None:
    """Errors of the arms on one buffer set, set 0, over `some_requests`."""
    requests = some_requests(len(x["seq_lens"]))
    expected, rows = reference(x, requests), rows_of(x, requests)
    for arm in arms:
        if arm.name in UNCHECKED:
            continue
        with kept_going(arm):
            out = arm.run(0)
            assert isinstance(out, Tensor)
            arm.error = relative_error([out[rows]], [expected])


def print_layer_times(lines: list[Line]) -> None:
    times = layer_times({line["arm"]: line for line in lines if "failure" not in line})
    if "dflare" not in times:
        return
    print("  a layer with all that it takes", file=sys.stderr)
    for name, time in sorted(times.items(), key=lambda item: item[1].total):
        print(
            f"    {name:18} {time.total:10.1f} us = kernel {time.kernel:.1f} + prologue "
            f"{time.prologue:.1f} + a layer's share of the step {time.per_step:.1f}"
            f"  {time.total / times['dflare'].total:6.2f} x dflare",
            file=sys.stderr,
        )


def parse(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, ARMS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--page", type=int, nargs="+", default=[1])
    arguments = parser.parse_args(command)
    check_options(parser, arguments)
    if arguments.device == "cpu":
        only_cuda = ["schedule", "prologue", *LIBRARIES]
        leave_out(parser, arguments, only_cuda, "they are CUDA kernels or serve them")
    longest = MAX_POSITION - max(PAIRS[model].block for model in arguments.model)
    for name, low, high in (("batch", 1, 4096), ("context", 1, longest), ("page", 1, longest)):
        for value in getattr(arguments, name):
            if not low <= value <= high:
                parser.error(f"--{name} {value}: expected {low} to {high}")
    return arguments


def run_shape(session: Session, shape: Shape, model: str) -> None:
    arguments = session.arguments
    count = 1 if arguments.profile else buffer_sets(shape.device, shape.kv_bytes)
    sets = make_sets(shape, count)
    inputs = BlockInputs(sets, shape)
    arms = build(own_makers(inputs) | library_makers(inputs), arguments.arms)
    named = {
        "model": model,
        "batch": shape.batch,
        "context": shape.context,
        "page": shape.page,
        "layers": shape.pair.layers,
        "dtype": arguments.dtype,
        "device": shape.device,
    }
    print_layer_times(session.arms(arms, count, named, functools.partial(refcheck, sets[0])))


def main(command: list[str] | None = None) -> int:
    arguments = parse(command)
    session = Session("block_attention", arguments)
    dtype = getattr(torch, arguments.dtype)
    for model in arguments.model:
        for page in arguments.page:
            for batch in arguments.batch:
                for context in arguments.context:
                    shape = Shape(PAIRS[model], batch, context, page, dtype, arguments.device)
                    label = f"{model}, batch {batch}, context {context}, page {page}"
                    session.shape(label, functools.partial(run_shape, session, shape, model))
    return session.status()


if __name__ == "__main__":
    sys.exit(main())
