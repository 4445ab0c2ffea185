"""Times of the operators beside other implementations, at the sizes of published pairs.

    python -m bench.kernels append --rows 16 64 256 --commit-lens none random > append.jsonl
    python -m bench.kernels attention --batch 1 8 32 --context 1024 4096 --page 1 > attention.jsonl
    python -m bench.kernels paged --device cpu --model smollm2-135m --batch 1 --queries 1 6
    python -m bench.kernels table append.jsonl attention.jsonl > table.md
    ncu --profile-from-start off python -m bench.kernels attention --profile dflare --batch 8

The modules of the operators describe their arms. Every result is checked against float64 before it
is measured. As soon as a case is measured, a JSON line an arm goes to stdout, a row each to stderr.
Exit status 1 if `dflare` fails or a result is wrong; a library that is missing is said, no more.
"""

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.kernels import append, attention, paged, table
from bench.kernels.shapes import PAIRS
from bench.kernels.timing import (
    ACCURACY,
    OVER_EAGER,
    Arm,
    Case,
    Peaks,
    build,
    environment,
    measure_peaks,
    take_turns,
)

DTYPES = {"cuda": ("bfloat16", "float16"), "cpu": ("float32", "bfloat16")}
SLOW_ARMS = ("compile",)  # takes longer to compile than to measure: only where it is asked for
CUDA_ARMS = {
    "wgmma",
    "cluster",
    "dspark",
    "schedule",
    "prologue",
    "gemm",
    "gemm+dflare",
    "gemm+fa3",
}
CUDA_ARMS |= set(attention.libraries.ARMS)


def parse(command: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message where options do not go together."""
    parser = argparse.ArgumentParser("python -m bench.kernels", description=__doc__.split("\n")[0])
    ops = parser.add_subparsers(dest="op", required=True)
    for module in (append, attention, paged):
        op = ops.add_parser(module.__name__.rpartition(".")[2], description=module.__doc__)
        op.add_argument("--device", choices=DTYPES, default="cuda")
        op.add_argument("--dtype", help="default: the device's first of float32, bfloat16, float16")
        op.add_argument("--model", choices=PAIRS, nargs="+", default=["qwen3-4b"])
        op.add_argument("--arms", choices=module.ARMS, nargs="+", help="default: all but compile")
        op.add_argument("--rounds", type=int, default=3, help="turns that each arm takes")
        op.add_argument("--warm", action="store_true", help="one buffer set: what fits is cached")
        op.add_argument("--threads", type=int, help="of a CPU")
        op.add_argument("--profile", choices=module.ARMS, help="one call of one arm, no times")
        if module is append:
            op.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
            kinds = "committed rows of each block: none (every row counts), full, random, a number"
            op.add_argument("--commit-lens", nargs="+", default=["none"], help=kinds)
        else:
            op.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
            op.add_argument("--context", type=int, nargs="+", default=[1024, 4096])
        if module is attention:
            op.add_argument("--page", type=int, nargs="+", default=[1])
        if module is paged:
            op.add_argument("--queries", type=int, nargs="+", default=[1, 6])
    made = ops.add_parser("table", help="a Markdown table of JSON lines", description=table.__doc__)
    made.add_argument("results", nargs="+", help="files of JSON lines")
    arguments = parser.parse_args(command)
    if arguments.op == "table":
        return arguments
    known = DTYPES[arguments.device]
    arguments.dtype = arguments.dtype or known[0]
    if arguments.dtype not in known:
        parser.error(f"--dtype {arguments.dtype}: on {arguments.device} {' or '.join(known)}")
    if arguments.op == "paged" and arguments.device == "cuda":
        parser.error("paged: an operator of the CPU alone; add --device cpu")
    if arguments.profile and arguments.device == "cpu":
        parser.error("--profile marks one call for ncu: it needs --device cuda")
    arms = {"append": append, "attention": attention, "paged": paged}[arguments.op].ARMS
    on_cpu = CUDA_ARMS if arguments.device == "cpu" else ()
    default = [arm for arm in arms if arm not in SLOW_ARMS]
    wanted = [arguments.profile] if arguments.profile else arguments.arms or default
    arguments.arms = [arm for arm in dict.fromkeys(wanted) if arm not in on_cpu]
    if not arguments.arms:
        parser.error(f"--arms {' '.join(wanted)}: there are none of these on a CPU")
    return arguments


def cases(a: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], Case]]]:
    """What is asked for: a name for each case, and what makes its buffers."""
    dtype, cold = getattr(torch, a.dtype), not (a.warm or a.profile)
    sizes = {
        "append": ("rows", "commit_lens"),
        "attention": ("batch", "context", "page"),
        "paged": ("batch", "queries", "context"),
    }[a.op]
    on = () if a.op == "paged" else (a.device,)
    make = {"append": append.case, "attention": attention.case, "paged": paged.case}[a.op]
    for model, *shape in itertools.product(a.model, *(getattr(a, name) for name in sizes)):
        name = {"model": model, **dict(zip(sizes, shape, strict=True))}
        yield name, lambda args=(PAIRS[model], *shape, dtype, *on, cold): make(*args)


def wrong(arms: list[Arm], dtype: torch.dtype) -> list[str]:
    """Sentences on results that are too far from float64, and on our own arms that failed."""
    errors = {arm.name: arm.error for arm in arms if arm.error is not None}
    limit = ACCURACY[dtype]
    found = [
        f"{name}: error {error:.1e}, expected at most {limit:.0e}"
        for name, error in errors.items()
        if not error <= limit
    ]
    ours, eager = errors.get("dflare"), errors.get("eager")
    if ours is not None and eager is not None and ours > OVER_EAGER * eager:
        found.append(f"dflare: error {ours:.1e} is more than {OVER_EAGER} x eager's {eager:.1e}")
    own = [arm for arm in arms if arm.name in ("dflare", "schedule") and arm.failure]
    return found + [f"{arm.name}: {arm.failure}" for arm in own]


def line_of(arm: Arm, peaks: Peaks, device: str) -> dict[str, Any]:
    """What was measured of an arm; times in microseconds of a call."""
    line: dict[str, Any] = {"arm": arm.name, "note": arm.note}
    if arm.failure:
        return line | {"failure": arm.failure}
    quantiles = {"us": 0.5, "us_p20": 0.2, "us_p80": 0.8}
    us = torch.tensor(arm.us, dtype=torch.float64)
    line |= {name: round(us.quantile(q).item(), 2) for name, q in quantiles.items()}
    line |= {"measurements": len(arm.us), "relative_error": arm.error}
    line["cuda_graph"] = arm.graph and device == "cuda"
    if arm.plan_us is not None:
        line["plan_us"] = round(arm.plan_us, 2)
    if arm.work:
        names = ("bytes", "flops", "floor_us")
        line |= dict(zip(names, (*arm.work, round(peaks.floor_us(arm.work), 2)), strict=True))
    return line


def measure(case: Case, a: argparse.Namespace, peaks: Peaks) -> tuple[list[Arm], list[dict]]:
    """Check and time the arms of a case."""
    arms = build(case.makers, a.arms)
    case.check([arm for arm in arms if not arm.failure])
    take_turns(arms, case.sets, a.rounds, a.device)
    return arms, [{"op": case.op} | case.shape | line_of(arm, peaks, a.device) for arm in arms]


def profile(arm: Arm) -> None:
    """One call between profiler marks, for `ncu --profile-from-start off`."""
    arm.run(0)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    arm.run(0)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(command: list[str] | None = None) -> int:
    a = parse(command)
    if a.op == "table":
        print(table.table(a.results))
        return 0
    if a.threads:
        torch.set_num_threads(a.threads)
    dtype, problems = getattr(torch, a.dtype), []
    if not a.profile:
        peaks = measure_peaks(a.device, dtype)
        setting = {"peak_gb_s": round(peaks.gb_s, 1), "peak_tflop_s": round(peaks.tflop_s, 2)}
        setting |= {"dtype": a.dtype, "device": a.device} | environment(a.device)
    for name, make in cases(a):
        print(" ".join(f"{key} {value}" for key, value in name.items()), file=sys.stderr)
        try:
            case = make()
            if a.profile:
                profile(case.makers[a.profile]())
                continue
            arms, lines = measure(case, a, peaks)
        except (torch.OutOfMemoryError, ValueError) as error:
            problems.append(f"{name}: not measured, {str(error).partition(chr(10))[0]}")
            print(problems[-1], file=sys.stderr)
            continue
        for line in lines:
            print(json.dumps({"model": name["model"], **line, **setting}), flush=True)
            print(table.row_for_a_terminal(line), file=sys.stderr)
        problems += [f"{name}: {sentence}" for sentence in wrong(arms, dtype)]
        del case, arms
        gc.collect()
        if a.device == "cuda":
            torch.cuda.empty_cache()
    for problem in problems:
        print(f"WRONG  {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
