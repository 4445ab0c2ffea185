"""Serve mixed load for a long time and check that nothing breaks, leaks or changes.

    python bench/serving/soak.py --minutes 30 --out runs/soak

A server without speculation first gives the reference answers. Then a server with DFLARE meets
bursts of greedy and sampled requests, long prompts with common beginnings, grammars, logprobs,
clients that leave, and requests that are wrong. Afterwards: no fault that is not the client's, all
greedy answers equal to the reference, every KV slot free or in the prefix cache, memory flat. Exit
status 0 and the last line `soak: passed` only then.
"""

import argparse
import asyncio
import json
import signal
import sys
import threading
import time
from pathlib import Path
from statistics import median

import psutil
import requests

sys.path.insert(0, str(Path(__file__).parent))

from server import Server
from traffic import Traffic, run

_REFERENCE_TOKENS = 64
_MEMORY_SLACK = 64e6  # bytes
_SAMPLE_SECONDS = 2.0


class MemoryWatch(threading.Thread):
    """Samples the resident memory of a server's processes."""

    def __init__(self, server: Server):
        super().__init__(daemon=True)
        self._server = server
        self._stop_event = threading.Event()
        self.samples: list[float] = []

    def run(self) -> None:
        while not self._stop_event.wait(_SAMPLE_SECONDS):
            total = 0.0
            for pid in self._server.processes():
                try:
                    total += psutil.Process(pid).memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.samples.append(total)

    def stop(self) -> None:
        self._stop_event.set()
        self.join()

    def growth(self) -> float:
        """Bytes gained from the second to the last quarter; the first one fills caches."""
        quarter = len(self.samples) // 4
        if quarter == 0:
            return 0.0
        early, late = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        return median(late) - median(early)


def reference_answers(server: Server, prompts: list[str]) -> list[list[int]]:
    """Greedy answers, one request at a time."""
    params = {"temperature": 0, "max_new_tokens": _REFERENCE_TOKENS, "ignore_eos": True}
    answers = []
    for prompt in prompts:
        body = {"text": prompt, "sampling_params": params}
        reply = requests.post(f"{server.url}/generate", json=body, timeout=600)
        reply.raise_for_status()
        answers.append(reply.json()["output_ids"])
    return answers


def pool_faults(server: Server) -> list[str]:
    """What is wrong with the KV pool of a server that has nothing to do any more."""
    state = requests.get(f"{server.url}/server_info", timeout=60).json()["internal_states"][0]
    capacity = state["memory_usage"]["token_capacity"]
    deadline = time.monotonic() + 60
    used = free = -1.0
    while time.monotonic() < deadline:
        counters = server.counters()
        used = counters["sglang:kv_used_tokens"]
        free = counters["sglang:kv_available_tokens"] + counters["sglang:kv_evictable_tokens"]
        if used == 0 and free == capacity:
            return []
        time.sleep(1)
    return [f"KV pool after the last request: {used:.0f} slots used, {free:.0f} of {capacity} free"]


def load_prompts(count: int) -> list[str]:
    folder = Path(__file__).parent / "prompts"
    texts = [
        json.loads(line)["conversations"][0]["content"]
        for name in ("easy", "hard")
        for line in (folder / f"{name}.jsonl").read_text().splitlines()[: count // 2]
    ]
    return texts


def soak(args: argparse.Namespace) -> list[str]:
    """Run the soak; return everything that went wrong."""
    target, draft = args.model, args.draft
    if target is None:
        from dflare.demo import demo_draft, demo_target

        target, draft = str(demo_target()), str(demo_draft())
    common = ["--model-path", target, "--log-level", "warning", *args.server_args]
    prompts = load_prompts(args.prompts)
    with Server(common, args.out / "reference.log") as server:
        print(f"reference: {len(prompts)} prompts of {_REFERENCE_TOKENS} tokens", flush=True)
        reference = reference_answers(server, prompts)
    speculation = ["--speculative-algorithm", "DFLARE", "--speculative-draft-model-path", draft]
    with Server([*common, *speculation], args.out / "server.log") as server:
        traffic = Traffic(server.url, prompts, reference, args.seed)
        watch = MemoryWatch(server)
        watch.start()
        print(f"load: {args.minutes} minutes, up to {args.concurrency} in flight", flush=True)
        asyncio.run(run(traffic, 60 * args.minutes, args.concurrency, args.seed))
        watch.stop()
        faults = list(traffic.outcome.faults)
        server.check()
        faults += pool_faults(server)
        server.check()
    sent = ", ".join(f"{count} {kind}" for kind, count in sorted(traffic.outcome.sent.items()))
    growth, slack = watch.growth(), _MEMORY_SLACK + 0.02 * max(watch.samples, default=0.0)
    print(f"sent: {sent}; memory grew by {growth / 1e6:.0f} MB, {slack / 1e6:.0f} allowed")
    if growth > slack:
        faults.append(f"memory grew by {growth / 1e6:.0f} MB, more than {slack / 1e6:.0f} MB")
    if traffic.outcome.sent.total() == 0:
        faults.append("nothing was sent; give more time")
    return faults


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
        # A pool so small that prefixes are evicted and requests retracted.
        default=["--max-total-tokens", "4096", "--max-running-requests", "8"],
    )
    args = parser.parse_args()
    if (args.model is None) != (args.draft is None):
        parser.error("--model and --draft go together")
    # An interrupted soak must take its server with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    faults = soak(args)
    for fault in faults[:20]:
        print(f"FAULT {fault}")
    print(f"soak: {f'{len(faults)} faults' if faults else 'passed'}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
