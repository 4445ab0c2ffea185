"""CPU operators against PyTorch at the shapes of the demo pair (SmolLM2-135M and its drafter).

    python bench/kernels/cpu_ops.py > results.jsonl

Implementations take turns, so that a busy machine slows all of them alike; each line has the
median, the 20th and 80th percentiles and the least over the rounds, which are short so that few of
them meet another process. JSON lines go to stdout, the table to stderr.
Baselines: `eager`, the operator's reference in plain PyTorch, and for attention `sdpa`, which
gathers each request's keys and values and calls scaled_dot_product_attention.
Caches are warm: what a call reads stays in the processor's caches where it fits.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from models import PAIRS
from torch import Tensor

import dflare
from dflare import ops
from dflare.ops.reference_math import apply_rope, rms_norm
from dflare.processor import processor_name

PAIR = PAIRS["smollm2-135m"]
HIDDEN, TAPS, LAYERS, BLOCK = PAIR.hidden, PAIR.taps, PAIR.layers, PAIR.block
Q_HEADS, KV_HEADS, HEAD_DIM = PAIR.heads, PAIR.kv_heads, PAIR.head_dim
MAX_POS = 4096
SCALE = HEAD_DIM**-0.5


@dataclass
class Measurement:
    op: str
    shape: dict[str, int]
    runs: dict[str, Callable[[], object]]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def microseconds(self, name: str) -> dict[str, float]:
        """Of one call, over the rounds."""
        times = torch.tensor(self.seconds[name]) * 1e6
        quantiles = {"median_us": 0.5, "p20_us": 0.2, "p80_us": 0.8, "min_us": 0.0}
        return {key: round(times.quantile(q).item(), 2) for key, q in quantiles.items()}


def rope_cache() -> Tensor:
    frequency = 1e5 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.arange(MAX_POS)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def page_table(lengths: list[int]) -> tuple[Tensor, int]:
    """Every token in a random slot: [bs, max_len] int32 and the number of slots."""
    slots = torch.randperm(sum(lengths) + 1).int()
    table = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
    for row, taken in enumerate(slots[: sum(lengths)].split(lengths)):
        table[row, : len(taken)] = taken
    return table, len(slots)


def append_context_kv(rows: int, dtype: torch.dtype) -> Measurement:
    pools = [torch.zeros(rows + 1, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2 * LAYERS)]
    width = 2 * KV_HEADS * HEAD_DIM
    arguments: dict[str, Any] = {
        "target_hidden": torch.randn(rows, TAPS * HIDDEN).to(dtype),
        "fusion_probs": torch.randn(LAYERS, TAPS).softmax(-1),
        "norm_weight": torch.ones(HIDDEN, dtype=dtype),
        "eps": 1e-5,
        "kv_weight": (torch.randn(LAYERS, width, HIDDEN) / HIDDEN**0.5).to(dtype),
        "kv_bias": None,
        "k_norm_weight": torch.ones(LAYERS, HEAD_DIM, dtype=dtype),
        "k_norm_eps": 1e-5,
        "cos_sin_cache": rope_cache(),
        "positions": torch.arange(rows),
        "cache_loc": torch.randperm(rows + 1)[:rows],
        "commit_lens": None,
        "block_size": BLOCK,
        "k_pools": pools[:LAYERS],
        "v_pools": pools[LAYERS:],
    }
    runs: dict[str, Callable[[], object]] = {
        "dflare": lambda: ops.append_context_kv(**arguments),
        "eager": lambda: ops.append_context_kv_reference(**arguments),
    }
    return Measurement("append_context_kv", {"rows": rows}, runs)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[queries, HQ, hd] over [keys, KV, hd]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)
    return out[0].transpose(0, 1)


def block_attention(bs: int, context: int, dtype: torch.dtype) -> Measurement:
    table, slots = page_table([context] * bs)
    arguments: dict[str, Any] = {
        "qkv": torch.randn(bs * BLOCK, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype),
        "q_norm_weight": torch.ones(HEAD_DIM, dtype=dtype),
        "k_norm_weight": torch.ones(HEAD_DIM, dtype=dtype),
        "eps": 1e-5,
        "cos_sin_cache": rope_cache(),
        "positions": (context + torch.arange(BLOCK)).repeat(bs),
        "k_pool": torch.randn(slots, KV_HEADS, HEAD_DIM).to(dtype),
        "v_pool": torch.randn(slots, KV_HEADS, HEAD_DIM).to(dtype),
        "req_to_token": table,
        "req_pool_indices": torch.arange(bs),
        "seq_lens": torch.full((bs,), context),
        "block_size": BLOCK,
        "window": -1,
        "causal": False,
        "scale": SCALE,
    }

    def with_sdpa() -> Tensor:
        a = arguments
        heads = a["qkv"].unflatten(1, (-1, HEAD_DIM))
        q, k, v = heads.split((Q_HEADS, KV_HEADS, KV_HEADS), dim=1)
        q = apply_rope(
            rms_norm(q, a["q_norm_weight"], a["eps"]), a["cos_sin_cache"], a["positions"]
        )
        k = apply_rope(
            rms_norm(k, a["k_norm_weight"], a["eps"]), a["cos_sin_cache"], a["positions"]
        )
        out = torch.empty_like(q)
        for b in range(bs):
            own = slice(b * BLOCK, (b + 1) * BLOCK)
            taken = table[b, :context].long()
            keys = torch.cat((a["k_pool"][taken], k[own]))
            values = torch.cat((a["v_pool"][taken], v[own]))
            out[own] = sdpa(q[own], keys, values, None)
        return out.flatten(1)

    runs: dict[str, Callable[[], object]] = {
        "dflare": lambda: ops.block_attention(**arguments),
        "eager": lambda: ops.block_attention_reference(**arguments),
        "sdpa": with_sdpa,
    }
    return Measurement("block_attention", {"bs": bs, "context": context}, runs)


def paged_attention(bs: int, queries: int, context: int, dtype: torch.dtype) -> Measurement:
    """The target's attention: `queries` is 1 to decode, BLOCK to verify, the prompt to prefill."""
    length = context + queries
    table, slots = page_table([length] * bs)
    arguments: dict[str, Any] = {
        "q": torch.randn(bs * queries, Q_HEADS, HEAD_DIM).to(dtype),
        "k_pool": torch.randn(slots, KV_HEADS, HEAD_DIM).to(dtype),
        "v_pool": torch.randn(slots, KV_HEADS, HEAD_DIM).to(dtype),
        "req_to_token": table,
        "req_pool_indices": torch.arange(bs),
        "seq_lens": torch.full((bs,), length),
        "query_start": torch.arange(bs + 1) * queries,
        "window": -1,
        "causal": True,
        "scale": SCALE,
        "logit_cap": 0.0,
    }

    def with_sdpa() -> Tensor:
        q = arguments["q"]
        out = torch.empty_like(q)
        mask = None
        if queries > 1:
            mask = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
        for b in range(bs):
            own = slice(b * queries, (b + 1) * queries)
            taken = table[b, :length].long()
            out[own] = sdpa(q[own], arguments["k_pool"][taken], arguments["v_pool"][taken], mask)
        return out.flatten(1)

    runs: dict[str, Callable[[], object]] = {
        "dflare": lambda: ops.paged_attention(**arguments),
        "eager": lambda: ops.paged_attention_reference(**arguments),
        "sdpa": with_sdpa,
    }
    return Measurement("paged_attention", {"bs": bs, "queries": queries, "context": context}, runs)


def cases(dtype: torch.dtype) -> Iterator[Measurement]:
    for rows in (8, 64, 512):
        yield append_context_kv(rows, dtype)
    for bs in (1, 4, 8):
        for context in (64, 512, 2048):
            yield block_attention(bs, context, dtype)
    for bs in (1, 4, 8):
        for queries in (1, BLOCK):
            for context in (64, 512, 2048):
                yield paged_attention(bs, queries, context, dtype)
    for prompt in (64, 512, 2048):
        yield paged_attention(1, prompt, 0, dtype)


def measure(case: Measurement, rounds: int, round_seconds: float) -> None:
    """Rounds in which every implementation runs for about `round_seconds`, in turning order."""
    calls = {}
    for name, run in case.runs.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(round_seconds / (time.perf_counter() - start)))
    names = list(case.runs)
    case.seconds = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for _ in range(calls[name]):
                case.runs[name]()
            case.seconds[name].append((time.perf_counter() - start) / calls[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--round-ms", type=float, default=1.0, help="time of a round and arm")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--op", help="only this operator")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    setting = {
        "cpu": processor_name(),
        "isa": torch.ops.dflare.cpu_isa(),
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "torch": torch.__version__,
        "dflare": dflare.__version__,
    }
    print("  ".join(f"{name} {value}" for name, value in setting.items()), file=sys.stderr)
    header = f"{'operator':18} {'shape':34} {'dflare us (p20-p80)':>24}  {'eager':>9} {'x':>5}"
    print(f"{header}  {'sdpa':>9} {'x':>5}", file=sys.stderr)
    for case in cases(getattr(torch, arguments.dtype)):
        if arguments.op not in (None, case.op):
            continue
        measure(case, arguments.rounds, arguments.round_ms / 1e3)
        record: dict[str, Any] = {"op": case.op, **case.shape, **setting}
        times = {name: case.microseconds(name) for name in case.runs}
        record.update(times)
        ours = times["dflare"]
        shape = " ".join(f"{name} {size}" for name, size in case.shape.items())
        spread = f"{ours['median_us']:.1f} ({ours['p20_us']:.1f}-{ours['p80_us']:.1f})"
        row = f"{case.op:18} {shape:34} {spread:>24}"
        for name in list(times)[1:]:
            speedup = times[name]["median_us"] / ours["median_us"]
            record[f"speedup_over_{name}"] = round(speedup, 2)
            row += f"  {times[name]['median_us']:9.1f} {speedup:5.1f}"
        print(row, file=sys.stderr)
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
