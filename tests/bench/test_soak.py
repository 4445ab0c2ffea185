import asyncio
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from checkpoints import write_random_draft, write_random_target
from soak import MemoryWatch
from traffic import Traffic

SOAK = Path(__file__).parents[2] / "bench" / "serving" / "soak.py"
PROMPTS = ["count to three", "say hello", "list the days"]
ANSWERS = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


def send_to(server_answers, requests=150):
    """Send requests of all kinds to a server that answers with a function of the body."""

    async def generate(request):
        body = await request.json()
        status, answer = server_answers(body)
        return web.json_response(answer, status=status)

    async def abort(request):
        return web.Response()

    async def session():
        app = web.Application()
        app.add_routes([web.post("/generate", generate), web.post("/abort_request", abort)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        traffic = Traffic(f"http://127.0.0.1:{port}", PROMPTS, ANSWERS, seed=0)
        async with aiohttp.ClientSession() as client:
            for _ in range(requests):
                await traffic.send(client)
        await runner.cleanup()
        return traffic.outcome

    return asyncio.run(session())


def correct(body):
    """What a server without faults does."""
    params = body.get("sampling_params", {})
    valid = "text" in body and len(body["text"]) < 10_000
    valid &= params.get("max_new_tokens", 0) >= 0 and params.get("temperature", 0) >= 0
    valid &= params.get("top_p", 1) <= 1 and params.get("regex") != "("
    if not valid:
        return 400, {"error": "wrong"}
    length = params["max_new_tokens"]
    known = dict(zip(PROMPTS, ANSWERS, strict=True)).get(body["text"], [])
    ids = (known + [0] * 300)[:length]
    return 200, {
        "text": "123-4567",
        "output_ids": ids,
        "meta_info": {"output_token_logprobs": [[-0.5, token, None] for token in ids]},
    }


def test_a_correct_server_has_no_faults_and_meets_every_kind():
    outcome = send_to(correct)
    assert outcome.faults == []
    assert len(outcome.sent) == 7


@pytest.mark.parametrize(
    ("breakage", "fault"),
    [
        (lambda answer: answer | {"output_ids": [0] * len(answer["output_ids"])}, "greedy"),
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


def test_memory_growth_ignores_the_start_and_sees_a_leak():
    watch = MemoryWatch(server=None)
    watch.samples = [1e9, 2e9, *[3e9] * 10]
    assert watch.growth() == 0
    watch.samples = [1e9 + 1e8 * i for i in range(12)]
    assert watch.growth() == pytest.approx(6e8)


@pytest.mark.slow
def test_a_short_soak_passes(tmp_path):
    target = write_random_target(tmp_path / "target", num_layers=4)
    draft = write_random_draft(tmp_path / "draft", num_target_layers=4)
    command = [sys.executable, str(SOAK), "--minutes", "0.5", "--out", str(tmp_path / "out")]
    command += ["--model", str(target), "--draft", str(draft)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("soak: passed\n")
