"""Measure one cell with SGLang's own load generator."""

import contextlib
import hashlib
import json
import os
import sys
import unittest.mock
from pathlib import Path
from typing import Any

from bench.serving.plan import Cell, Sweep
from bench.serving.server import BenchServer

_WARM_UP_TOKENS = 16


def measure(sweep: Sweep, cell: Cell, server: BenchServer, out: Path) -> dict[str, Any]:
    """Put one load on a running server.

    Args:
        sweep, cell, server: What to measure, and where.
        out: Folder of the sweep; the generator's own output goes to `bench.log` there.

    Returns:
        The record of the cell: throughput, latencies in ms, accept length, mean width, errors.

    Raises:
        RuntimeError: The generator gave up, or every request failed.
        DFlareError: The server ended.
    """
    load = (cell.dataset, cell.concurrency)
    if load not in server.warmed_up:
        # What the first steps at this load cost is the start-up's, and so are their tokens: this
        # run is over before the counters are read.
        _run_generator(sweep, cell, server, out, cell.concurrency, _WARM_UP_TOKENS)
        server.warmed_up.add(load)
    count = max(sweep.min_requests, sweep.requests_per_stream * cell.concurrency)
    before, load_before = server.counters(), os.getloadavg()[0]
    details = _run_generator(sweep, cell, server, out, count, sweep.output_tokens)
    server.check()
    delta = {name: value - before.get(name, 0.0) for name, value in server.counters().items()}
    record = summarise(details, delta, counted=server.COUNTS_TOKENS)
    if record["errors"] == record["requests"]:
        raise RuntimeError(f"every request failed: {details['errors'][0].strip()[-300:]}")
    return cell.model_dump() | record | {"machine_load": load_before}


def summarise(
    details: dict[str, Any], delta: dict[str, float], *, counted: bool = True
) -> dict[str, Any]:
    """The figures of one run.

    Args:
        details: The generator's result, with its details.
        delta: What the server's counters gained during the run.
        counted: Whether the server told how many tokens an answer has. If not, the generator takes
            what was asked for, but for the count by its own tokenizer.

    Returns:
        Among others `accept_length`, tokens committed per request and step, and `mean_width`,
        tokens verified per request and step.
    """
    tokens = details["total_output_tokens" if counted else "total_output_tokens_retokenized"]
    record: dict[str, Any] = {
        "output_tok_s": tokens / details["duration"],
        "output_tokens": tokens,
        "seconds": details["duration"],
        "requests": len(details["errors"]),
        "errors": sum(bool(error) for error in details["errors"]),
        "outputs": [
            hashlib.sha256(text.encode()).hexdigest()[:12] for text in details["generated_texts"]
        ],
        "accept_length": None,
        "mean_width": None,
    }
    for name in ("ttft", "tpot", "e2e_latency"):
        for p, theirs in (("p50", "median"), ("p90", "p90"), ("p99", "p99")):
            known = counted or name != "tpot"
            record[f"{name}_{p}_ms"] = details[f"{theirs}_{name}_ms"] if known else None
    if steps := delta.get("sglang:spec_verify_calls_total"):
        # An answer's first token comes from its prefill.
        decoded = delta["sglang:generation_tokens_total"] - delta["sglang:num_requests_total"]
        record["accept_length"] = decoded / steps
    if request_steps := delta.get("dflare_request_steps_total"):
        record["mean_width"] = delta["dflare_verified_tokens_total"] / request_steps
    return record


def _run_generator(
    sweep: Sweep, cell: Cell, server: BenchServer, out: Path, requests: int, output_tokens: int
) -> dict[str, Any]:
    """Call `sglang.benchmark.serving` in this process: importing it takes longer than a cell.

    Returns:
        Its result, with details.

    Raises:
        RuntimeError: It gave up.
    """
    from sglang.benchmark import serving

    result_file, log = out / "bench-result.jsonl", out / "bench.log"
    result_file.unlink(missing_ok=True)
    dataset = next(each for each in sweep.datasets if each.name == cell.dataset)
    argv = ["sglang.benchmark.serving", "--base-url", server.url, *server.generator_flags()]
    argv += dataset.flags(
        requests,
        output_tokens,
        out,
        range_ratio=sweep.range_ratio,
        ignore_eos=sweep.simulate_acc_len is not None,
    )
    argv += ["--max-concurrency", str(cell.concurrency), "--seed", str(sweep.seed_of(cell.repeat))]
    argv += ["--warmup-requests", "0", "--disable-tqdm"]
    argv += ["--output-file", str(result_file), "--output-details"]
    try:
        with (
            log.open("a") as file,
            contextlib.redirect_stdout(file),
            unittest.mock.patch.object(sys, "argv", argv),
        ):
            serving.cli_main()
    except SystemExit as error:
        raise RuntimeError(f"the load generator gave up, see {log}: {error}") from error
    return json.loads(result_file.read_text().splitlines()[-1])
