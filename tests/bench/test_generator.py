"""SGLang's load generator takes our flags: the real one against a server that only echoes."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from bench.serving import client, plan
from bench.serving.llama import LlamaServer
from bench.serving.server import Server
from checkpoints import write_random_target
from sweep_cells import make_sweep
from transformers import AutoTokenizer


class EchoServer:
    """Answers the generator's requests with five tokens; counts every path that it is asked for."""

    COUNTS_TOKENS, generator_flags = Server.COUNTS_TOKENS, Server.generator_flags

    def __init__(self, target):
        self._target = str(target)
        self.warmed_up = set()
        self.asked = asked = Counter()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked[self.path] += 1
                body = {"model_path": str(target), "data": [{"id": str(target)}]}
                self.reply(json.dumps(body))

            def do_POST(self):
                path = self.path.split("?")[0]
                asked[path] += 1
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                meta = {"completion_tokens": 5, "prompt_tokens": 3}
                answer = json.dumps({"text": "hello", "meta_info": meta, "output_ids": [1] * 5})
                if path == "/v1/completions":
                    answer = json.dumps({"choices": [{"text": "hello"}]})
                streams = path in ("/generate", "/v1/completions")
                self.reply(f"data: {answer}\n\ndata: [DONE]\n\n" if streams else "")

            def reply(self, text):
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def counters(self):
        return {"generated": float(self.asked["/generate"])}

    def check(self):
        pass

    def stop(self):
        self._http.shutdown()


@pytest.fixture
def server(tmp_path):
    echo = EchoServer(write_random_target(tmp_path / "target", num_layers=2))
    yield echo
    echo.stop()


DATASETS = [
    plan.Dataset(name="file", prompts=["easy"]),
    plan.Dataset(name="random", args=["--dataset-name", "random-ids", "--tokenize-prompt"]),
    plan.Dataset(name="shared", shared_prefixes=4, args=["--gsp-system-prompt-len", "8"]),
]


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda dataset: dataset.name)
def test_a_cell_is_measured_apart_from_its_warm_up(server, tmp_path, monkeypatch, dataset):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the generator keeps shared prefixes
    gained = []
    summarise = client.summarise
    monkeypatch.setattr(
        client,
        "summarise",
        lambda details, delta, **_: gained.append(delta) or summarise(details, {}),
    )
    sweep = make_sweep(datasets=[dataset], min_requests=6)
    cell = plan.Cell(arm="none", dataset=dataset.name, concurrency=2, repeat=0)
    record = client.measure(sweep, cell, server, tmp_path)
    assert record["errors"] == 0
    assert record["requests"] == 6
    assert gained == [{"generated": 6.0}]
    assert server.asked["/generate"] > 6
    assert server.asked["/flush_cache"] == 2


def test_tokens_of_a_llama_server_are_counted_from_its_text(server, tmp_path, monkeypatch):
    """Its stream has no counts, and the generator would take what was asked for."""
    monkeypatch.setattr(EchoServer, "COUNTS_TOKENS", LlamaServer.COUNTS_TOKENS)
    monkeypatch.setattr(EchoServer, "generator_flags", LlamaServer.generator_flags)
    sweep = make_sweep(datasets=DATASETS[:1], min_requests=6, output_tokens=64)
    cell = plan.Cell(arm="none", dataset="file", concurrency=2, repeat=0)
    record = client.measure(sweep, cell, server, tmp_path)
    assert record["errors"] == 0
    assert server.asked["/v1/completions"] > 4
    assert server.asked["/flush_cache"] == server.asked["/generate"] == 0
    assert record["tpot_p50_ms"] is None
    said = len(AutoTokenizer.from_pretrained(server._target)("hello")["input_ids"])
    assert record["output_tok_s"] == pytest.approx(6 * said / record["seconds"])


def test_a_generator_that_gives_up_is_an_error(server, tmp_path):
    dataset = plan.Dataset(name="none", args=["--dataset-name", "no such kind"])
    cell = plan.Cell(arm="none", dataset="none", concurrency=1, repeat=0)
    with pytest.raises(RuntimeError, match="the load generator gave up"):
        client.measure(make_sweep(datasets=[dataset]), cell, server, tmp_path)
