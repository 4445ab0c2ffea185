"""The stock command line serves the pair over HTTP, survives bad requests and reports itself."""

import json
import re
import sys
from pathlib import Path

import pytest
import requests
from served import kill_and_watch

from dflare.apps.launch import pair_args
from dflare.apps.server_process import ServerProcess

pytestmark = pytest.mark.slow


class Server(ServerProcess):
    """What a user types."""

    COMMAND = (str(Path(sys.executable).with_name("sglang")), "serve")

    def chat(self, content: str, **more) -> requests.Response:
        body = {"model": "default", "messages": [{"role": "user", "content": content}]} | more
        return requests.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)


@pytest.fixture(scope="module")
def server(demo_pair, tmp_path_factory):
    target, draft = map(str, demo_pair)
    flags = ["--model-path", target, *pair_args(draft)]
    flags += ["--context-length", "1024", "--max-total-tokens", "8192", "--enable-metrics"]
    flags += ["--max-running-requests", "4"]  # larger batches are not measured at start
    with Server(flags, tmp_path_factory.mktemp("server") / "log") as running:
        running.wait_until_healthy()
        yield running


def test_requests_are_admitted_as_soon_as_a_slot_is_free(server):
    """DFLASH would wait for several: its default where the flag is not set."""
    info = requests.get(f"{server.url}/server_info", timeout=30).json()
    assert info["min_free_slots_delay"] == 1


def test_chat(server):
    answer = server.chat("What is the capital of France?", temperature=0, max_tokens=24).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_log_says_once_what_runs(server):
    lines = [line for line in server.log.read_text().splitlines() if "DFLARE: drafter" in line]
    assert len(lines) == 1
    for fact in ("3 layers", "taps 1, 6, 11", "block 6", "bytes a token", "backend dflare"):
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


def test_neither_metrics_nor_log_hold_the_text_of_a_prompt(server):
    word = "zyzzogeton"
    answer = server.chat(f"Repeat: {word}", temperature=0, max_tokens=8)
    assert answer.status_code == 200
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    assert "sglang:prompt_tokens_total" in text and word not in text
    assert word not in server.log.read_text()


def test_it_ends_when_its_scheduler_is_killed(server):
    """The last test of this file: nobody serves afterwards."""
    kill_and_watch(server, "sglang::scheduler")
