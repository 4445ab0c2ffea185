"""A SGLang server as a child process: started, watched until healthy, stopped whole."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO

import requests

from dflare.errors import DFlareError

START_SECONDS = 600
# Below what systems give to outgoing connections: the server binds its port only once it is loaded,
# and no connection made meanwhile must have taken it.
_PORTS = range(20_000, 32_768)


class ServerProcess:
    """`python -m sglang.launch_server` with its own process group and log file.

    Use it as a context manager: leaving it ends every process that the server began.
    """

    COMMAND = (sys.executable, "-m", "sglang.launch_server")

    def __init__(
        self, arguments: list[str], log: Path, environment: dict[str, str] | None = None
    ) -> None:
        """Start a server.

        Args:
            arguments: SGLang's, without host and port.
            log: file for everything it prints.
            environment: variables on top of this process's.
        """
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._output: IO[str] = log.open("w")
        self._process = subprocess.Popen(
            [*self.COMMAND, *arguments, "--port", str(port)],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | (environment or {}),
        )

    def wait_until_healthy(self, on_tick=lambda: None, seconds: float = START_SECONDS) -> None:
        """Return once the server answers.

        Args:
            on_tick: called about once a second meanwhile, to show that something goes on.
            seconds: how long it may take.

        Raises:
            DFlareError: it ended, or took longer; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            try:
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                pass
            on_tick()
            time.sleep(1)
        raise DFlareError(
            f"the server was not healthy after {seconds:.0f} s; the end of {self.log}:\n"
            f"{self._log_end()}"
        )

    def check(self) -> None:
        """Do nothing while it runs.

        Raises:
            DFlareError: it has ended; with the end of its log.
        """
        if self._process.poll() is not None:
            raise DFlareError(
                f"the server ended with status {self._process.returncode}; the end of "
                f"{self.log}:\n{self._log_end()}"
            )

    @property
    def pid(self) -> int:
        """Id of the server's first process."""
        return self._process.pid

    def _log_end(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End all of its processes: politely, then not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(timeout=10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self._output.close()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    tried = random.sample(_PORTS, min(64, len(_PORTS)))
    for port in tried:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise DFlareError(
        f"all {len(tried)} ports tried between {_PORTS.start} and {_PORTS.stop - 1} are taken; "
        "a server needs a free one"
    )
