"""Start a real SGLang server, wait until it answers, stop all of its processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import requests
from prometheus_client.parser import text_string_to_metric_families

_STOP_SECONDS = 20.0


class ServerError(RuntimeError):
    """A server that did not start or died; says where its log is and how it ends."""


class Server:
    """A server process group, its address and its log."""

    def __init__(self, args: list[str], port: int, log: Path, env: dict[str, str] | None = None):
        """
        Args:
            args: Flags of `sglang.launch_server`, without host and port.
            port: Port on localhost.
            log: File for stdout and stderr.
            env: Environment variables on top of ours.
        """
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.log = log
        self._command = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1"]
        self._command += ["--port", str(port), "--enable-metrics", *args]
        self._env = os.environ | (env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def start(self, timeout: float = 600.0) -> None:
        """Start and wait until the server generates.

        Raises:
            ServerError: It ended, or did not answer in time.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._output = self.log.open("wb")
        self._process = subprocess.Popen(
            self._command,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=self._env,
            # A group of its own: schedulers and detokenizers end with it.
            start_new_session=True,
        )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check()
            try:
                if requests.get(f"{self.url}/health_generate", timeout=30).ok:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)
        self.stop()
        raise ServerError(f"no answer within {timeout:.0f} s; {self._log_end()}")

    def check(self) -> None:
        """
        Raises:
            ServerError: The server has ended.
        """
        if self._process is None or self._process.poll() is not None:
            raise ServerError(f"the server has ended; {self._log_end()}")

    def stop(self) -> None:
        """End the whole process group: politely, then not."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        # The leader may be gone while its children still are not.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        if self._output:
            self._output.close()

    def counters(self) -> dict[str, float]:
        """Sums over labels of the metrics that end in `_total`, and of the KV pool's gauges."""
        text = requests.get(f"{self.url}/metrics", timeout=30).text
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.endswith("_total") or sample.name.startswith("sglang:kv_"):
                    totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
                if sample.name == "dflare_verify_steps_total":
                    key = f"width {sample.labels['width']}"
                    totals[key] = totals.get(key, 0.0) + sample.value
        return totals

    def processes(self) -> list[int]:
        """Ids of the server's processes."""
        import psutil

        if self._process is None:
            return []
        leader = psutil.Process(self._process.pid)
        return [leader.pid, *(child.pid for child in leader.children(recursive=True))]

    def _log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return f"{self.log} ends with:\n" + "\n".join(lines[-25:])

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
