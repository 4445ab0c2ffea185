"""SGLang with DFLARE on this machine: every draft backend, with and without CUDA graphs.

    python -m bench.kernels.end_to_end > end_to_end.jsonl                     # a random small pair
    python -m bench.kernels.end_to_end --target Qwen/Qwen3-8B --draft AngelSlim/Qwen3-8b-dflare
    python -m bench.kernels.end_to_end --device cpu

Each arm is an engine in a process of its own that answers the same prompts greedily. A JSON line an
arm: seconds, tokens a second, tokens a verify step, and how many tokens each answer has in common
with the one without speculation before they part; in bf16 they part where two logits tie. Exit
status 1 if an arm fails, or if one with `dflare` attention accepts less than half of what the same
drafter does with a stock backend. The random pair shows that everything runs, not how fast: its
drafter is untrained.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.kernels.timing import environment

BACKEND = "speculative_draft_attention_backend"
ARMS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "dflare": {BACKEND: "dflare"},
    "dflare_eager": {BACKEND: "dflare", "disable_cuda_graph": True},
    "dflare_sync": {BACKEND: "dflare", "disable_overlap_schedule": True},
    "dflare_window": {BACKEND: "dflare", "speculative_draft_window_size": 64},
    "dflare_page16": {BACKEND: "dflare", "page_size": 16},
    "flashinfer": {BACKEND: "flashinfer"},
    "triton": {BACKEND: "triton"},
}
CPU_ARMS = ("none", "dflare", "dflare_window", "dflare_page16")


def write_random_pair(folder: Path) -> tuple[str, str]:
    """A Llama and a drafter with heads of 64, the smallest that the CUDA kernels take."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from checkpoints import write_random_draft, write_random_target

    sizes: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "num_heads": 8, "num_kv_heads": 2}
    target = write_random_target(folder / "target", **sizes, dtype="bfloat16")
    draft = write_random_draft(folder / "draft", **sizes, dtype="bfloat16", block_size=8)
    return str(target), str(draft)


def run_arm(arguments: argparse.Namespace) -> None:
    """In the arm's own process: answers as a JSON line."""
    import sglang

    draw = random.Random(0)
    lengths = [draw.randrange(5, 400) for _ in range(arguments.prompts)]
    prompts = [[draw.randrange(5, 500) for _ in range(length)] for length in lengths]
    own = ARMS[arguments.arm]
    server_args = {} if own is None else {"speculative_algorithm": "DFLARE", **own}
    if own is not None:
        server_args["speculative_draft_model_path"] = arguments.draft
    engine = sglang.Engine(
        model_path=arguments.target,
        dtype="bfloat16" if arguments.device == "cuda" else "float32",
        log_level="warning",
        mem_fraction_static=0.6,
        max_running_requests=16,
        **server_args,
    )
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": arguments.tokens}
    engine.generate(input_ids=prompts[:2], sampling_params=sampling | {"max_new_tokens": 16})
    engine.flush_cache()
    start = time.perf_counter()
    answers = engine.generate(input_ids=prompts, sampling_params=sampling)
    seconds = time.perf_counter() - start
    tokens = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
    steps = sum(answer["meta_info"].get("spec_verify_ct") or 0 for answer in answers)
    line = {"seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 1)}
    line["tokens_per_step"] = round(tokens / steps, 3) if steps else None
    print(json.dumps(line | {"answers": [answer["output_ids"] for answer in answers]}))
    sys.stdout.flush()
    engine.shutdown()


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def measure_arm(name: str, command: list[str], limit: float) -> dict[str, Any] | None:
    try:
        done = subprocess.run(
            [*command, "--arm", name], stdout=subprocess.PIPE, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: not done after {limit:.0f} s", file=sys.stderr)
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if not lines:
        print(f"{name}: failed with status {done.returncode}", file=sys.stderr)
        return None
    return json.loads(lines[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--target", help="default: a random pair, made in a temporary folder")
    parser.add_argument("--draft")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these, after `none`")
    parser.add_argument("--limit", type=float, default=240, help="seconds for an arm")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        run_arm(arguments)
        return 0

    setting, results = environment(arguments.device), {}
    with tempfile.TemporaryDirectory() as folder:
        target, draft = arguments.target, arguments.draft
        if target is None:
            target, draft = write_random_pair(Path(folder))
        command = [sys.executable, "-m", "bench.kernels.end_to_end"]
        command += ["--target", target, "--draft", draft]
        for name in ("device", "prompts", "tokens"):
            command += [f"--{name}", str(getattr(arguments, name))]
        chosen = arguments.arms or (CPU_ARMS if arguments.device == "cpu" else ARMS)
        for name in dict.fromkeys(("none", *chosen)):
            result = measure_arm(name, command, arguments.limit)
            results[name] = result
            if result is None:
                continue
            plain = results["none"]["answers"] if results["none"] else []
            answers = result.pop("answers") if name != "none" else plain
            same = [common_prefix(a, b) for a, b in zip(answers, plain, strict=False)]
            line = {"op": "end_to_end", "arm": name, **result, "common_prefix": same, **setting}
            line.pop("answers", None)
            print(json.dumps(line | {"tokens": arguments.tokens}), flush=True)
            print(
                f"{name:14} {result['seconds']:8.2f} s  {result['tokens_per_s']:8.1f} tokens/s  "
                f"{result['tokens_per_step']} tokens/step  same as none: {same}",
                file=sys.stderr,
            )
    stock = [results[name] for name in ("flashinfer", "triton") if results.get(name)]
    least = max((result["tokens_per_step"] for result in stock), default=0) / 2
    failed = [
        name
        for name, result in results.items()
        if result is None or (name.startswith("dflare") and result["tokens_per_step"] < least)
    ]
    print(f"failed: {', '.join(failed)}" if failed else "all arms ran", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
