"""Serve mixed load for a long time and check that nothing breaks, leaks or changes.

    python -m bench.serving.soak --minutes 30 --out runs/soak

A server without speculation first gives the reference answers. Then a server with DFLARE meets
bursts of greedy and sampled requests, long prompts with common beginnings, grammars, logprobs,
clients that leave, and wrong and odd requests, in a KV pool so small that requests are retracted.
Afterwards: no fault that is not the client's, every greedy answer (also of a grammar, with logprobs
or cut off) equal to the reference, every KV slot free or in the prefix cache, no process dead or
growing, no traceback in the log, at least three widths used, requests retracted. Exit status 0 and
the last line `soak: passed` only then.
"""

import argparse
import asyncio
import json
import re
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import requests

from bench.serving.process_watch import ProcessWatch
from bench.serving.reference import GREEDY_TOKENS, Reference, ask, collect, greedy_params
from bench.serving.server import Server
from bench.serving.traffic import Outcome, Traffic, run, warm_up
from dflare.adaptive.config import VARIABLE

_POOL_SECONDS = 60  # SGLang writes an idle server's gauges every 30 s
_POOL_GAUGE = re.compile(r"sglang:kv_(used|available|evictable)_tokens")
_WIDTHS = 3  # different ones at least, or the soak says nothing about changing them
_TRACES = re.compile(r"Traceback \(most recent|Fatal Python error|leak detected")


def pool_faults(server: Server) -> list[str]:
    """What is wrong with the KV pools of a server that has nothing to do any more."""
    state = requests.get(f"{server.url}/server_info", timeout=60).json()["internal_states"][0]
    capacity = state["memory_usage"]["token_capacity"]
    deadline = time.monotonic() + _POOL_SECONDS
    while True:
        # By rank: in a sum over ranks one could make up for another.
        pools: dict[tuple[tuple[str, str], ...], dict[str, float]] = defaultdict(dict)
        for name, labels, value in server.samples():
            if kind := _POOL_GAUGE.fullmatch(name):
                pools[tuple(sorted(labels.items()))][kind[1]] = value
        faults = [] if pools else ["no gauges of the KV pool on /metrics"]
        for rank, gauges in pools.items():
            used, free = gauges["used"], gauges["available"] + gauges["evictable"]
            if used or free != capacity:
                faults.append(
                    f"KV pool {dict(rank)} after the last request: {used:.0f} slots used, "
                    f"{free:.0f} of {capacity} free or in the prefix cache"
                )
        if not faults or time.monotonic() > deadline:
            return faults
        time.sleep(1)


def load_faults(server: Server) -> list[str]:
    """What the load has failed to reach: widths, and retraction. Prints what it has."""
    samples = server.samples()
    steps = {
        int(labels["width"]): int(value)
        for name, labels, value in samples
        if name == "dflare_verify_steps_total" and value
    }
    retracted = sum(v for name, _, v in samples if name == "sglang:num_retracted_requests_total")
    widths = ", ".join(f"{width}: {count}" for width, count in sorted(steps.items()))
    print(f"steps by width: {widths}; {retracted:.0f} requests retracted", flush=True)
    faults = []
    if len(steps) < _WIDTHS:
        faults.append(f"steps of {len(steps)} widths, expected {_WIDTHS}: nothing adapted")
    if not retracted:
        faults.append("no request was retracted; lower --max-total-tokens in --server-args")
    return faults


def log_faults(log: Path) -> list[str]:
    """Lines of a server's log that no request may cause, right or wrong."""
    lines = log.read_text(errors="replace").splitlines()
    return [
        f"{log}, line {number}: {line[:200]}"
        for number, line in enumerate(lines, start=1)
        if _TRACES.search(line)
    ]


def flush_faults(server: Server, reference: Reference) -> list[str]:
    """Whether anything is still queued, which forbids to flush, and whether it then serves on."""
    reply = requests.post(f"{server.url}/flush_cache", params={"timeout": 30}, timeout=60)
    if reply.status_code != 200:
        return [f"flush_cache: status {reply.status_code}: {reply.text[:200]}"]
    text, expected = next(iter(reference.greedy.items()))
    got = ask(server.url, text, greedy_params(GREEDY_TOKENS))
    return [] if got == expected else [f"after flush_cache: got {got}, expected {expected}"]


def load_prompts(count: int) -> list[str]:
    folder = Path(__file__).parent / "prompts"
    texts = [
        json.loads(line)["conversations"][0]["content"]
        for name in ("easy", "hard")
        for line in (folder / f"{name}.jsonl").read_text().splitlines()[: count // 2]
    ]
    return texts


def soak(args: argparse.Namespace, outcome: Outcome) -> None:
    """Run the soak; `outcome` gains everything that went wrong.

    Raises:
        DFlareError: A server did not start, or ended.
        requests.RequestException: A server does not answer any more.
    """
    target, draft = args.model, args.draft
    if target is None:
        from dflare.demo import demo_draft, demo_target

        target, draft = str(demo_target()), str(demo_draft())
    common = ["--model-path", target, "--log-level", "warning", *args.server_args]
    prompts = load_prompts(args.prompts)
    with Server(common, args.out / "reference.log") as server:
        print(f"reference: {len(prompts)} prompts of {GREEDY_TOKENS} tokens", flush=True)
        reference = collect(server.url, prompts, args.seed)
    speculation = ["--speculative-algorithm", "DFLARE", "--speculative-draft-model-path", draft]
    # Whatever this process inherited: a soak that does not adapt shows little. And requests are
    # admitted as if they were short, or the pool would never be too full for those that run.
    env = {VARIABLE: "on", "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}
    with Server([*common, *speculation], args.out / "server.log", env) as server:
        traffic = Traffic(server.url, reference, args.seed, outcome)
        asyncio.run(warm_up(traffic))
        watch = ProcessWatch(server.processes())
        watch.start()
        print(f"load: {args.minutes} minutes, up to {args.concurrency} in flight", flush=True)
        seconds = 60 * args.minutes
        try:
            asyncio.run(
                run(traffic, seconds, args.concurrency, args.seed, lambda: watch.died is not None)
            )
        finally:
            watch.stop()
            sent = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.sent.items()))
            print(f"sent: {sent}", flush=True)
            for name, slope in watch.growth().items():
                print(f"memory of {name}: {60e-6 * slope:+.2f} MB a minute", flush=True)
            outcome.faults += watch.faults()
            outcome.faults += log_faults(server.log)
        server.check()
        outcome.faults += load_faults(server)
        outcome.faults += pool_faults(server)
        outcome.faults += flush_faults(server, reference)
        server.check()
    if outcome.sent.total() == 0:
        outcome.faults.append("nothing was sent; give more time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="folder of the logs")
    parser.add_argument("--model", help="target; without it the demo pair")
    parser.add_argument("--draft", help="drafter of --model")
    parser.add_argument("--concurrency", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=24, help="prompts with known answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--server-args",
        nargs=argparse.REMAINDER,
        # So small a pool that prefixes are evicted and requests retracted.
        default=["--max-total-tokens", "1024", "--max-running-requests", "12"],
    )
    args = parser.parse_args()
    if (args.model is None) != (args.draft is None):
        parser.error("--model and --draft go together")
    # An interrupted soak must take its server with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcome, finished = Outcome(), False
    try:
        soak(args, outcome)
        finished = True
    finally:
        faults = outcome.faults
        for fault in faults[:20]:
            print(f"FAULT {fault}")
        result = f"{len(faults)} faults" if faults else "passed" if finished else "not finished"
        print(f"soak: {result}", flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
