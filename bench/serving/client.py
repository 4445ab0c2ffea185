"""Measure one cell with SGLang's own load generator."""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from plan import Cell, Dataset, Sweep
from server import Server

_PERCENTILES = ("p50", "p90", "p99")


def measure(
    sweep: Sweep, dataset: Dataset, cell: Cell, server: Server, out: Path
) -> dict[str, Any]:
    """Put one load on a running server.

    Args:
        sweep: The plan.
        dataset, cell: What to measure.
        server: Where.
        out: Folder of the sweep; the generator's own output goes to `bench.log` there.

    Returns:
        The record of the cell: throughput, latencies in ms, accept length, mean width, errors.
    """
    count = max(sweep.min_requests, sweep.requests_per_stream * cell.concurrency)
    result_file = out / "bench-result.jsonl"
    result_file.unlink(missing_ok=True)
    argv = ["--backend", "sglang", "--base-url", server.url]
    argv += dataset.flags(count, sweep.output_tokens, out)
    argv += ["--max-concurrency", str(cell.concurrency), "--seed", str(sweep.seed + cell.repeat)]
    argv += ["--warmup-requests", str(cell.concurrency), "--flush-cache", "--disable-tqdm"]
    argv += ["--output-file", str(result_file), "--output-details"]
    before = server.counters()
    load_before = os.getloadavg()[0]
    _run_generator(argv, out / "bench.log")
    server.check()
    after = server.counters()
    details = json.loads(result_file.read_text().splitlines()[-1])
    delta = {name: after[name] - before.get(name, 0.0) for name in after}
    return cell.model_dump() | summarise(details, delta) | {"machine_load": load_before}


def summarise(details: dict[str, Any], delta: dict[str, float]) -> dict[str, Any]:
    """The figures of one run.

    Args:
        details: The generator's result, with its details.
        delta: What the server's counters gained during the run, warm-up included.
    """
    median = {"p50": "median"}
    record: dict[str, Any] = {
        "output_tok_s": details["output_throughput"],
        "output_tokens": details["total_output_tokens"],
        "seconds": details["duration"],
        "requests": len(details["errors"]),
        "errors": sum(bool(error) for error in details["errors"]),
        "outputs": [
            hashlib.sha256(text.encode()).hexdigest()[:12] for text in details["generated_texts"]
        ],
    }
    for name in ("ttft", "tpot", "e2e_latency"):
        for p in _PERCENTILES:
            record[f"{name}_{p}_ms"] = details[f"{median.get(p, p)}_{name}_ms"]
    steps = delta.get("sglang:spec_verify_calls_total", 0.0)
    widths = {int(k.split()[1]): v for k, v in delta.items() if k.startswith("width ") and v}
    record["mean_width"] = None
    record["accept_length"] = None
    if steps:
        # An answer's first token comes from its prefill.
        decoded = delta["sglang:generation_tokens_total"] - delta["sglang:num_requests_total"]
        record["accept_length"] = decoded / steps
    if widths:
        record["mean_width"] = sum(w * n for w, n in widths.items()) / sum(widths.values())
    return record


def _run_generator(argv: list[str], log: Path) -> None:
    """Call `sglang.benchmark.serving` in this process: importing it takes longer than a cell."""
    from sglang.benchmark import serving

    saved = sys.argv
    sys.argv = ["sglang.benchmark.serving", *argv]
    try:
        with log.open("a") as file, contextlib.redirect_stdout(file):
            serving.cli_main()
    except SystemExit as error:
        raise RuntimeError(f"the load generator gave up, see {log}: {error}") from error
    finally:
        sys.argv = saved
