"""The stock command line serves the pair over HTTP, survives bad requests and reports itself."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

pytestmark = pytest.mark.slow

_START_SECONDS = 300


class Server:
    """A server process started by a command, with its log."""

    def __init__(self, command: list[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--port", str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except requests.ConnectionError:
                time.sleep(1)
        raise AssertionError(f"no health after {_START_SECONDS} s: {self.log.read_text()[-3000:]}")

    def chat(self, content: str, **more) -> requests.Response:
        body = {"model": "default", "messages": [{"role": "user", "content": content}]} | more
        return requests.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(demo_pair, tmp_path_factory):
    target, draft = demo_pair
    command = [str(Path(sys.executable).with_name("sglang")), "serve", "--model-path", str(target)]
    command += ["--speculative-algorithm", "DFLARE", "--speculative-draft-model-path", str(draft)]
    command += ["--context-length", "1024", "--max-total-tokens", "8192", "--enable-metrics"]
    running = Server(command, tmp_path_factory.mktemp("server") / "log")
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def test_chat(server):
    answer = server.chat("What is the capital of France?", temperature=0, max_tokens=24).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_log_says_once_what_runs(server):
    lines = [line for line in server.log.read_text().splitlines() if "DFLARE: drafter" in line]
    assert len(lines) == 1
    for fact in ("3 layers", "taps 1, 6, 11", "block 8", "bytes a token", "backend dflare"):
        assert fact in lines[0], lines[0]


def test_bad_requests_do_not_stop_it(server):
    too_long = server.chat("word " * 3000, temperature=0, max_tokens=4)
    assert too_long.status_code == 400
    assert re.search(r"1024|context", too_long.text), too_long.text
    assert requests.post(f"{server.url}/generate", data="{", timeout=30).status_code >= 400
    bad_grammar = server.chat(
        "hello",
        max_tokens=8,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": 3}},
        },
    )
    assert bad_grammar.status_code >= 400 or bad_grammar.json()["choices"]
    assert server.chat("hello", temperature=-1, max_tokens=4).status_code == 400
    assert server.chat("Say yes.", temperature=0, max_tokens=8).status_code == 200


def test_streaming_over_http(server):
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "Count from 1 to 5."}],
        "temperature": 0,
        "max_tokens": 24,
    }
    plain = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    stream = requests.post(
        f"{server.url}/v1/chat/completions", json=body | {"stream": True}, stream=True, timeout=120
    )
    events = [line[6:] for line in stream.iter_lines() if line.startswith(b"data: {")]
    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(pieces) == plain["choices"][0]["message"]["content"]


def test_metrics_report_accept_length(server):
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    assert "sglang:spec_accept_length" in text
