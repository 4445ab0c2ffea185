"""What each proposer adds to a server's speed, with one request at a time.

    python -m bench.serving.proposers [--rounds 3] [--tokens 96] [--out proposers.json]

Servers of the demo pair, without speculation, with chains, with look-ups and with trees as well,
answer the same prompts in turn, so that a busy moment falls on all of them. Prompts: texts to
repeat or to edit, and the benchmark's easy and hard ones.
"""

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import requests
from transformers import AutoTokenizer

from dflare.adaptive.config import VARIABLE
from dflare.apps.launch import pair_args
from dflare.apps.server_process import ServerProcess
from dflare.demo import demo_draft, demo_target
from dflare.training.data.prompts import encode, read_prompts

PROMPTS = Path(__file__).with_name("prompts")
# Settings of the policy by arm; none for no speculation.
ARMS: dict[str, str | None] = {
    "none": None,
    "chain": '{"proposers": ["chain"]}',
    "look-ups": '{"proposers": ["chain", "lookup"]}',
    "trees": "on",
}
_DOCUMENTS = (
    "The harbour opens at six. Boats with a red flag wait outside until the pilot has come on "
    "board. Boats with a green flag enter at once and tie up at the north pier. The fee is paid in "
    "the small office beside the lighthouse, before noon, in coins.",
    "def area(shape):\n    if shape.kind == 'circle':\n        return 3.14 * shape.radius ** 2\n"
    "    if shape.kind == 'square':\n        return shape.side ** 2\n    if shape.kind == 'bar':\n"
    "        return shape.width * shape.height\n    raise ValueError(shape.kind)",
    "Name: Ada Byron. Street: 12 Mill Lane. Town: Northfield. Telephone: 555 0142. Order: two "
    "chairs, one table, four cups and a lamp with a blue shade. Delivery: on Friday morning, by "
    "the back door.",
)
_TASKS = (
    "Repeat this text word for word:\n\n{}",
    "Copy the following text and change nothing:\n\n{}",
    "Write this text again, but in it replace the first number by 7:\n\n{}",
)


def prompts(tokenizer: Any, each: int) -> dict[str, list[list[int]]]:
    """Token ids by kind of prompt."""
    copying = [task.format(text) for text in _DOCUMENTS for task in _TASKS]
    chats = {"copying": [[{"role": "user", "content": text}] for text in copying]}
    chats |= {file.stem: read_prompts(file) for file in sorted(PROMPTS.glob("*.jsonl"))}
    return {
        kind: [encode(tokenizer, messages) for messages in list(some)[:each]]
        for kind, some in chats.items()
    }


def answer(server: ServerProcess, ids: list[int], tokens: int) -> tuple[list[int], float, int]:
    """Output ids, seconds and verified steps of one greedy answer."""
    sampling = {"temperature": 0, "max_new_tokens": tokens}
    start = time.perf_counter()
    reply = requests.post(
        f"{server.url}/generate", json={"input_ids": ids, "sampling_params": sampling}, timeout=300
    )
    seconds = time.perf_counter() - start
    reply.raise_for_status()
    body = reply.json()
    output = body["output_ids"]
    return output, seconds, body["meta_info"].get("spec_verify_ct") or len(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=3, help="over all prompts, after one to warm up"
    )
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--each", type=int, default=9, help="prompts of a kind")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    target, draft = map(str, (demo_target(), demo_draft()))
    asked = prompts(AutoTokenizer.from_pretrained(target), args.each)
    flags = ["--model-path", target, "--skip-tokenizer-init", "--sleep-on-idle"]
    flags += ["--max-running-requests", "4", "--log-level", "warning"]
    flags += ["--mem-fraction-static", "0.9", "--max-total-tokens", "4096"]  # four servers share it
    speeds: dict[str, dict[str, list[float]]] = {k: {a: [] for a in ARMS} for k in asked}
    lengths: dict[str, dict[str, float]] = {k: {} for k in asked}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for arm, settings in ARMS.items():
            pair = pair_args(draft) if settings else []
            server = ServerProcess(flags + pair, folder / arm, {VARIABLE: settings or "on"})
            servers[arm] = stack.enter_context(server)
            servers[arm].wait_until_healthy()
        for round_ in range(args.rounds + 1):
            for kind, some in asked.items():
                totals = {arm: [0, 0.0, 0] for arm in ARMS}
                for ids in some:
                    replies = {arm: answer(servers[arm], ids, args.tokens) for arm in ARMS}
                    texts = [output for output, _, _ in replies.values()]
                    if any(text != texts[0] for text in texts):
                        raise SystemExit(f"{kind}: the servers' answers differ")
                    for arm, (output, seconds, steps) in replies.items():
                        totals[arm][0] += len(output)
                        totals[arm][1] += seconds
                        totals[arm][2] += steps
                for arm, (tokens, seconds, steps) in totals.items():
                    if round_:
                        speeds[kind][arm].append(tokens / seconds)
                    lengths[kind][arm] = tokens / steps
                    print(
                        f"round {round_}  {kind:8} {arm:8} {tokens / seconds:6.1f} tokens/s, "
                        f"{tokens / steps:.2f} a step",
                        flush=True,
                    )
    for kind, by_arm in speeds.items():
        plain = median(by_arm["none"])
        for arm, some_speeds in by_arm.items():
            print(
                f"{kind:8} {arm:8} {median(some_speeds):6.1f} tokens/s, "
                f"{median(some_speeds) / plain:.2f} x ({min(some_speeds):.1f} to "
                f"{max(some_speeds):.1f}), {lengths[kind][arm]:.2f} a step"
            )
    if args.out:
        args.out.write_text(
            json.dumps({"tokens_per_second": speeds, "tokens_a_step": lengths}, indent=1)
        )


if __name__ == "__main__":
    main()
