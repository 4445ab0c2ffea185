"""A real `dflare serve` of a pair under a client's key, and how a real server ends."""

import re
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests

from dflare.apps.server_process import ServerProcess

_FLAGS = "--context-length 256 --max-total-tokens 4096 --skip-server-warmup"
CLIENT, ADMIN = "client", "admin"
KEY = {"Authorization": f"Bearer {CLIENT}"}


class Served(ServerProcess):
    """Use it as a context manager: inside it answers, leaving it ends every process."""

    COMMAND = (sys.executable, "-m", "dflare.cli", "serve")

    def __init__(
        self, target: Path, draft: Path, log: Path, more: str = "", **environment: str
    ) -> None:
        keys = ["--api-key", CLIENT, "--admin-api-key", ADMIN]
        pair = ["--model-path", str(target), "--draft", str(draft)]
        super().__init__([*pair, *_FLAGS.split(), *keys, *more.split()], log, environment)

    def __enter__(self) -> "Served":
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self


def generate(server: ServerProcess, tokens: int, stream: bool = False) -> requests.Response:
    """Ask for a greedy answer of exactly so many tokens."""
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": list(range(10, 40)), "sampling_params": params, "stream": stream}
    return requests.post(
        f"{server.url}/generate", json=body, headers=KEY, timeout=60, stream=stream
    )


def processes(server: ServerProcess) -> dict[str, psutil.Process]:
    """The first process, and the others by their titles, such as `sglang::scheduler`."""
    named = {"first": psutil.Process(server.pid)}
    for child in named["first"].children(recursive=True):
        title = "".join(child.cmdline()[:1]).split()
        if title and title[0].startswith("sglang::"):
            named[title[0]] = child
    return named


def kill_and_watch(server: ServerProcess, name: str) -> None:
    """Kill a process in the middle of a request: client and processes learn of it within 5 s."""
    everyone = processes(server)
    lines = generate(server, 200, stream=True).iter_lines()
    assert next(lines).startswith(b"data:")
    start = time.monotonic()
    everyone[name].kill()
    with pytest.raises(requests.RequestException):
        list(lines)
    _, alive = psutil.wait_procs(everyone.values(), timeout=30)
    seconds = time.monotonic() - start
    print(f"{name} killed: everything has ended after {seconds:.1f} s")
    assert not alive and seconds < 5, f"{len(alive)} processes left after {seconds:.1f} s"
    last = server.log.read_text().splitlines()[-1]
    cause = rf"the server ends: process \S+ \({everyone[name].pid}\) ended with exit code -9"
    assert re.search(cause, last), last
