"""The server under load: its counters, its processes, and whether it still runs."""

from pathlib import Path

import psutil
import requests
from prometheus_client.parser import text_string_to_metric_families

from dflare.engine.server_process import ServerProcess


class Server(ServerProcess):
    """A server process with metrics, ready when it is made."""

    def __init__(self, args: list[str], log: Path, env: dict[str, str] | None = None):
        """
        Args:
            args: Flags of `sglang.launch_server`, without host and port.
            log: File for stdout and stderr.
            env: Environment variables on top of ours.

        Raises:
            DFlareError: It ended, or did not answer in time.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(["--enable-metrics", *args], log, env)
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise

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
        leader = psutil.Process(self.pid)
        return [leader.pid, *(child.pid for child in leader.children(recursive=True))]
