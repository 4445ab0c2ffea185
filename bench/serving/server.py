"""The server under load: its counters, its processes, and whether it still runs."""

from pathlib import Path

import psutil
import requests
from prometheus_client.parser import text_string_to_metric_families

from dflare.apps.server_process import ServerProcess


class BenchServer(ServerProcess):
    """A server process that a sweep loads, ready when it is made.

    Attributes:
        warmed_up: Loads that it has met, (dataset, concurrency).
        COUNTS_TOKENS: Whether its stream tells how many tokens an answer has.
    """

    COUNTS_TOKENS = True

    def __init__(self, args: list[str], log: Path, env: dict[str, str] | None = None):
        """
        Args:
            args: Flags of the server, without host and port.
            log: File for stdout and stderr.
            env: Environment variables on top of ours.

        Raises:
            DFlareError: It ended, or did not answer in time.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self.warmed_up: set[tuple[str, int]] = set()
        super().__init__(args, log, env)
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def generator_flags(self) -> list[str]:
        """Flags that make SGLang's load generator speak to it."""
        raise NotImplementedError

    def counters(self) -> dict[str, float]:
        """Counters that only grow, by name."""
        raise NotImplementedError


class Server(BenchServer):
    """`sglang.launch_server` with metrics."""

    COMMAND = (*ServerProcess.COMMAND, "--enable-metrics")

    def generator_flags(self) -> list[str]:
        return ["--backend", "sglang", "--flush-cache"]

    def counters(self) -> dict[str, float]:
        """The metrics that end in `_total`, summed over their labels."""
        totals: dict[str, float] = {}
        for name, _, value in self.samples():
            if name.endswith("_total"):
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def samples(self) -> list[tuple[str, dict[str, str], float]]:
        """Name, labels and value of everything on `/metrics`.

        Raises:
            requests.RequestException: The server does not answer.
        """
        reply = requests.get(f"{self.url}/metrics", timeout=30)
        reply.raise_for_status()
        return [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(reply.text)
            for sample in family.samples
        ]

    def processes(self) -> list[int]:
        """Ids of the server's processes."""
        leader = psutil.Process(self.pid)
        return [leader.pid, *(child.pid for child in leader.children(recursive=True))]
