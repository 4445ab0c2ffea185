import pytest
from bench.serving import client, plan
from sweep_cells import make_sweep


def generator_result(errors=("", "")):
    result = {
        "total_output_tokens": 100,
        "duration": 2.0,
        "errors": list(errors),
        "generated_texts": ["x"] * len(errors),
    }
    for name in ("ttft", "tpot", "e2e_latency"):
        result |= {f"{p}_{name}_ms": 1.0 for p in ("median", "p90", "p99")}
    return result


class FakeServer:
    """Writes down when its counters were read."""

    COUNTS_TOKENS = True

    def __init__(self, events):
        self.warmed_up = set()
        self._events = events

    def counters(self):
        self._events.append("counters")
        return {}

    def check(self):
        pass


def test_a_run_is_summarised_from_the_generator_and_the_servers_counters():
    delta = {
        "sglang:generation_tokens_total": 110.0,
        "sglang:num_requests_total": 10.0,
        "sglang:spec_verify_calls_total": 40.0,
        "dflare_request_steps_total": 40.0,
        "dflare_verified_tokens_total": 70.0,
    }
    found = client.summarise(generator_result(errors=["", "timeout"]), delta)
    assert found["errors"] == 1
    assert found["output_tok_s"] == 50
    assert found["accept_length"] == 2.5
    assert found["mean_width"] == 1.75
    assert len(found["outputs"]) == 2


def test_a_server_is_warmed_up_once_for_each_load_before_its_counters_are_read(
    tmp_path, monkeypatch
):
    events = []

    def generate(sweep, cell, server, out, requests, output_tokens):
        events.append(requests)
        return generator_result()

    monkeypatch.setattr(client, "_run_generator", generate)
    sweep, server = make_sweep(min_requests=4, requests_per_stream=3), FakeServer(events)
    for repeat, concurrency in ((0, 2), (1, 2), (0, 1)):
        cell = plan.Cell(arm="none", dataset="easy", concurrency=concurrency, repeat=repeat)
        client.measure(sweep, cell, server, tmp_path)
    measured = ["counters", 6, "counters"]
    assert events == [2, *measured, *measured, 1, "counters", 4, "counters"]


def test_a_cell_of_which_every_request_failed_is_a_failure(tmp_path, monkeypatch):
    result = generator_result(errors=["refused"])
    monkeypatch.setattr(client, "_run_generator", lambda *_: result)
    cell = plan.Cell(arm="none", dataset="easy", concurrency=1, repeat=0)
    with pytest.raises(RuntimeError, match="every request failed: refused"):
        client.measure(make_sweep(), cell, FakeServer([]), tmp_path)
