"""A real server under load: what it reports while it runs, and how it ends when it is asked to.

test_server.py and test_swap.py end theirs by killing a process.
"""

import json
import re
import signal
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from operator import itemgetter

import psutil
import pytest
import requests
from served import KEY, Served, generate, processes

from dflare.adaptive import AdaptiveConfig, CostTable

pytestmark = pytest.mark.slow

METRICS = {
    "dflare_verify_width",
    "dflare_accept_length",
    "dflare_accept_rate_position",
    "dflare_step_seconds_predicted",
    "dflare_step_seconds_actual",
    "dflare_verify_steps_total",
    "dflare_exploring_steps_total",
    "dflare_request_steps_total",
    "dflare_verified_tokens_total",
    "dflare_committed_tokens_total",
    "dflare_drafts_reached_total",
    "dflare_drafts_accepted_total",
    "dflare_accepted_tokens_total",
    "dflare_acceptance_low",
}


def logged_steps(server) -> str:
    (batch_1,) = re.findall(r"step time in ms by arm, batch 1: ([^;]+);", server.log.read_text())
    return batch_1


def test_it_measures_chooses_and_reports(random_server):
    """Step times and a line a second in the log, Prometheus."""
    server = random_server
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 200}
    body = {"input_ids": [[5, 6, 7], [8, 9]], "sampling_params": params}
    for _ in range(6):
        assert requests.post(f"{server.url}/generate", json=body, headers=KEY, timeout=120).ok
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    log = server.log.read_text()
    assert re.match(r"plain 1 \d", logged_steps(server))
    assert re.search(r"DFLARE: verify width [\d.]+, accept length [\d.]+, step [\d.]+ ms", log)
    assert re.search(r"DFLARE: verify width .*, acceptance by position [\d.]+", log)
    samples = [line for line in text.splitlines() if line.startswith("dflare_")]
    assert {re.split(r"[{ ]", line)[0] for line in samples} - {"dflare_created"} == METRICS
    assert all('model_name="' in line and 'tp_rank="0"' in line for line in samples)
    positions = re.findall(r'accept_rate_position\{[^}]*position="(\d+)"', text)
    assert sorted(positions) == ["1", "2", "3"], "one for each drafted token of a block of four"


def test_sigterm_under_load_lets_requests_finish_and_then_ends(random_server):
    server = random_server
    expected = generate(server, 200).json()["output_ids"]
    answers = [generate(server, 200, stream=True).iter_lines() for _ in range(4)]
    assert all(next(lines).startswith(b"data: {") for lines in answers)
    everyone = processes(server)
    everyone["first"].send_signal(signal.SIGTERM)
    for lines in answers:
        events = [line for line in lines if line.startswith(b"data: {")]
        assert json.loads(events[-1][6:])["output_ids"] == expected
    start = time.monotonic()
    _, alive = psutil.wait_procs(everyone.values(), timeout=60)
    print(f"ended {time.monotonic() - start:.1f} s after the last answer")
    assert not alive
    # SGLang looks every 5 s whether there is still a request, and would kill a scheduler that
    # has not left after 15 s.
    assert time.monotonic() - start < 30
    assert "Schedulers still alive" not in server.log.read_text()


def test_it_leaves_a_trace_of_its_steps(random_server):
    """Written when it ended."""
    trace = random_server.log.parent / "trace"
    check_step_trace(trace)
    (times,) = trace.glob("step-times-*.json")
    logged = [float(cell.split(" ")[2]) / 1e3 for cell in logged_steps(random_server).split(", ")]
    arms = AdaptiveConfig.for_block_size(4, proposers=["chain"]).arms
    assert CostTable.load(times, arms).seconds(1) == pytest.approx(logged, rel=0.01)


@pytest.mark.long
def test_nobody_is_left_when_the_first_process_is_killed(random_pair, tmp_path):
    with Served(*random_pair, tmp_path / "log") as server:
        lines = generate(server, 200, stream=True).iter_lines()
        assert next(lines).startswith(b"data:")
        everyone = processes(server)
        everyone["first"].kill()
        with pytest.raises(requests.RequestException):
            list(lines)
        _, alive = psutil.wait_procs(everyone.values(), timeout=5)
        assert not alive


def check_step_trace(folder):
    """Every part of the steps of both kinds is in the trace and, of the frequent, in the table."""
    (trace,) = (json.loads(file.read_text()) for file in folder.glob("trace-*.json"))
    spans = sorted(
        (
            (event["name"], event["ts"], event["ts"] + event["dur"], event["args"])
            for event in trace
            if event["ph"] == "X"
        ),
        key=itemgetter(1),
    )
    starts = [start for _, start, *_ in spans]
    parts_by_kind = {"plain": Counter(), "drafting": Counter()}
    inside = 0
    for name, start, end, args in spans:
        if name == "step":
            met = spans[bisect_left(starts, start) : bisect_right(starts, end)]
            parts = [part for part, _, last, _ in met if last <= end]
            parts_by_kind["plain" if args["width"] == 1 else "drafting"].update(parts)
            inside += len(parts) - 1
    counts = Counter(name for name, *_ in spans)
    assert inside == counts.total() - counts["step"] - counts["schedule"], "parts of no step"
    plain, drafting = parts_by_kind["plain"], parts_by_kind["drafting"]
    assert plain["step"] == plain["verify"] == plain["sampling"] > plain["append"] > 0
    assert plain["draft"] == 0
    assert drafting["step"] == drafting["verify"] == drafting["sampling"] > 0
    assert drafting["draft"] == 2 * drafting["step"], "the forward, and the head with its argmax"
    assert drafting["append"] >= drafting["step"]

    (table,) = (file.read_text().splitlines() for file in folder.glob("steps-*.md"))
    columns = [cell.strip() for cell in table[0].strip("|").split("|")]
    rows = [dict(zip(columns, row.strip("|").split("|"), strict=True)) for row in table[2:]]
    by_cell = {(int(row["batch"]), int(row["width"])): row for row in rows}
    row = by_cell[2, 1]
    assert float(row["draft"]) == 0
    assert float(row["verify"]) > float(row["sampling"]) > 0
    assert float(row["step"]) > float(row["other"]) > 0
