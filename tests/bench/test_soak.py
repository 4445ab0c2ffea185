import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import requests
from aiohttp import web
from bench.serving import soak
from bench.serving.odd_requests import wrong_requests
from bench.serving.process_watch import ProcessWatch
from bench.serving.reference import Reference
from bench.serving.traffic import Outcome, Traffic, run, warm_up
from checkpoints import write_random_draft, write_random_target

SCRIPTED_SERVER = Path(__file__).with_name("scripted_server.py")
ROOT = Path(__file__).parents[2]
REFERENCE = Reference(
    greedy={"count to three": [1, 2, 3, 4], "say hello": [5, 6, 7, 8]},
    long={"many words and say hello": [9, 10, 11, 12]},
    pattern={"count to three": [50, 51], "say hello": [52, 53]},
)
WRONG = [body for text in REFERENCE.greedy for _, body in wrong_requests(text)]
KINDS = {
    *("greedy", "long answer", "sampled", "long prompt"),
    *("grammar", "logprobs", "cut off", "bad", "odd"),
}


def send_to(server_answers, requests=150, first=False):
    """Send requests to a server that answers with a function of the body.

    They are of random kinds, or with `first` those that are sent before memory is watched.
    """

    async def generate(request):
        body = await request.json()
        status, answer = server_answers(body)
        if not body.get("stream"):
            return web.json_response(answer, status=status)
        response = web.StreamResponse()
        await response.prepare(request)
        ids = answer["output_ids"]
        for length in range(1, len(ids)):
            chunk = json.dumps({"text": None, "output_ids": ids[:length]})
            await response.write(f"data: {chunk}\n\n".encode())
        return response

    async def abort(request):
        return web.Response()

    async def session():
        app = web.Application()
        paths = ("/generate", "/v1/completions", "/v1/chat/completions")
        app.add_routes([web.post("/abort_request", abort), *(web.post(p, generate) for p in paths)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        traffic = Traffic(f"http://127.0.0.1:{port}", REFERENCE, seed=0, outcome=Outcome())
        if first:
            await warm_up(traffic)
        async with aiohttp.ClientSession() as client:
            for _ in range(requests):
                await traffic.send(client)
        await runner.cleanup()
        return traffic.outcome

    return asyncio.run(session())


def correct(body):
    """What a server without faults does."""
    params = body.get("sampling_params")
    if body in WRONG or not isinstance(params, dict):
        return 400, {"error": "wrong"}
    length = params["max_new_tokens"]
    known = REFERENCE.greedy | REFERENCE.long
    if "regex" in params:
        ids = REFERENCE.pattern[body["text"]]
    else:
        ids = (known[body["text"]] + [0] * 300)[:length]
    return 200, {
        "text": "123-4567",
        "output_ids": ids,
        "meta_info": {"output_token_logprobs": [[-0.5, token, None] for token in ids]},
    }


def test_a_correct_server_has_no_faults_and_meets_every_kind():
    outcome = send_to(correct)
    assert outcome.faults == []
    assert set(outcome.sent) == KINDS


def test_every_kind_and_every_wrong_request_comes_before_memory_is_watched():
    """The first very long prompt makes a tokenizer grow by 20 MB, once."""
    refused = []

    def server_answers(body):
        status, answer = correct(body)
        if status == 400:
            refused.append(json.dumps(body))
        return status, answer

    outcome = send_to(server_answers, requests=0, first=True)
    assert outcome.faults == []
    assert set(outcome.sent) == KINDS
    assert any(
        {json.dumps(body) for _, body in wrong_requests(text)} <= set(refused)
        for text in REFERENCE.greedy
    )
    assert max(map(len, refused)) > 100_000


@pytest.mark.parametrize(
    ("breakage", "fault"),
    [
        *(
            (lambda answer: answer | {"output_ids": [0] * len(answer["output_ids"])}, kind)
            for kind in ("greedy", "long answer", "long prompt", "grammar", "logprobs", "cut off")
        ),
        (lambda answer: answer | {"output_ids": answer["output_ids"][:-1]}, "sampled"),
        (lambda answer: answer | {"text": "12-34"}, "grammar"),
        (lambda answer: answer | {"meta_info": {"output_token_logprobs": []}}, "logprobs"),
    ],
)
def test_a_wrong_answer_is_a_fault(breakage, fault):
    def broken(body):
        status, answer = correct(body)
        return status, breakage(answer) if status == 200 else answer

    assert any(line.startswith(fault) for line in send_to(broken).faults)


def test_a_server_error_is_a_fault():
    assert send_to(lambda body: (500, {}), requests=20).faults


def test_accepting_a_wrong_request_is_a_fault():
    def lenient(body):
        status, answer = correct(body)
        return (200, answer) if status == 400 else (status, answer)

    faults = send_to(lenient).faults
    assert faults
    assert all(line.startswith("bad") for line in faults)


@pytest.fixture
def child():
    """A process that waits until it is killed."""
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


def test_memory_growth_ignores_the_start_and_sees_a_leak_in_one_process(child):
    watch = ProcessWatch([child.pid])
    minutes = [60.0 * i for i in range(13)]
    watch.samples = {
        "flat": [(t, min(t * 1e7, 3e9)) for t in minutes],
        "leaking": [(t, 1e9 + t * 1e5) for t in minutes],
    }
    assert watch.growth() == {"flat": 0.0, "leaking": pytest.approx(1e5)}
    (fault,) = watch.faults()
    assert re.search(r"of leaking grew by 6.00 MB a minute, 36 MB in the second half", fault)


def test_a_process_that_ends_is_a_fault_and_ends_the_load(child):
    watch = ProcessWatch([child.pid])
    watch.sample()
    assert watch.faults() == []
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as a server's child
    watch.sample()
    assert watch.faults() == [f"process sleep ({child.pid}) ended"]
    traffic = Traffic("http://127.0.0.1:9", REFERENCE, 0, Outcome())
    asyncio.run(run(traffic, 300.0, 2, 0, stop=lambda: watch.died is not None))


def test_tracebacks_in_the_log_are_faults_and_refusals_are_not(tmp_path):
    log = tmp_path / "server.log"
    log.write_text(
        "[http_server] Error: top_p must be in (0, 1], got 7.\n"
        "Traceback (most recent call last):\n"
        "pool memory leak detected! 3 slots\n"
    )
    assert [re.search(r"line (\d)", fault)[1] for fault in soak.log_faults(log)] == ["2", "3"]


class QuietServer:
    """A server at rest, with these metrics."""

    url = "http://server"

    def __init__(self, *samples):
        self._samples = list(samples)

    def samples(self):
        return self._samples


@pytest.mark.parametrize(("free", "faults"), [((90, 60), 0), ((91, 59), 1), ((90, 59), 1)])
def test_slots_missing_in_one_ranks_pool_are_not_made_up_by_another(monkeypatch, free, faults):
    state = {"internal_states": [{"memory_usage": {"token_capacity": 100}}]}
    monkeypatch.setattr(requests, "get", lambda *_, **__: SimpleNamespace(json=lambda: state))
    monkeypatch.setattr(soak, "_POOL_SECONDS", 0)
    gauges = [
        (f"sglang:kv_{name}_tokens", {"dp_rank": str(rank)}, value)
        for rank in (0, 1)
        for name, value in (
            ("used", 0.0),
            ("available", float(free[rank])),
            ("evictable", (10.0, 40.0)[rank]),
        )
    ]
    found = soak.pool_faults(QuietServer(*gauges))
    assert (len(found) > 0) == faults


@pytest.mark.parametrize(
    ("widths", "retracted", "fault"),
    [((1, 4), 7, "2 widths"), ((1, 2, 4), 0, "retracted"), ((1, 2, 4), 7, None)],
)
def test_a_soak_that_adapts_nothing_or_retracts_nothing_fails(widths, retracted, fault):
    steps = [("dflare_verify_steps_total", {"width": str(w)}, 5.0) for w in widths]
    unused = ("dflare_verify_steps_total", {"width": "8"}, 0.0)
    count = ("sglang:num_retracted_requests_total", {}, float(retracted))
    faults = soak.load_faults(QuietServer(*steps, unused, count))
    assert len(faults) == bool(fault)
    assert all(fault in line for line in faults)


@pytest.mark.slow
@pytest.mark.long
def test_a_short_soak_passes(tmp_path):
    """With a random drafter the policy would soon draft nothing: here widths take turns."""
    target = write_random_target(tmp_path / "target", num_layers=4)
    draft = write_random_draft(tmp_path / "draft", num_target_layers=4)
    scripted = (sys.executable, str(SCRIPTED_SERVER))
    program = f"from bench.serving import soak; soak.Server.COMMAND = {scripted!r}; soak.main()"
    command = [sys.executable, "-c", program, "--minutes", "0.5", "--prompts", "8"]
    command += ["--out", str(tmp_path / "out"), "--model", str(target), "--draft", str(draft)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("soak: passed\n")
