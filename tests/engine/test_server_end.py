"""How a real server ends; test_server.py and test_openapi.py end theirs by killing a process."""

import json
import signal
import time

import psutil
import pytest
import requests
from served import Served, generate, processes

pytestmark = pytest.mark.slow


def test_sigterm_under_load_lets_requests_finish_and_then_ends(random_pair, tmp_path):
    with Served(*random_pair, tmp_path / "log") as server:
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
