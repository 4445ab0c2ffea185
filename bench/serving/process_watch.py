"""Watches a server's processes: which of them died, whose memory grows."""

import threading
import time
from collections import defaultdict
from statistics import linear_regression

import psutil

_SAMPLE_SECONDS = 2.0
_LEAK = 16e6  # bytes that one process may gain in the second half


class ProcessWatch(threading.Thread):
    """Samples the resident memory of every process that the server has when this is made.

    Attributes:
        died: The first process that ended, or None.
        samples: By process, `name (id)`: seconds since the start and bytes.
    """

    def __init__(self, pids: list[int]):
        super().__init__(daemon=True)
        self._processes = [psutil.Process(pid) for pid in pids]
        self._names = [f"{process.name()} ({process.pid})" for process in self._processes]
        self._stop_event = threading.Event()
        self._start_time = time.monotonic()
        self.died: str | None = None
        self.samples: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def run(self) -> None:
        while not self._stop_event.wait(_SAMPLE_SECONDS):
            self.sample()

    def sample(self) -> None:
        """Look once at every process."""
        now = time.monotonic() - self._start_time
        for name, process in zip(self._names, self._processes, strict=True):
            try:
                memory = process.memory_info().rss
                alive = process.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                alive = False
            if not alive:
                self.died = self.died or name
                continue
            self.samples[name].append((now, float(memory)))

    def stop(self) -> None:
        """Sample no more."""
        self._stop_event.set()
        self.join()

    def growth(self) -> dict[str, float]:
        """Bytes a second by process, fitted to the second half: the first one fills caches."""
        slopes = {}
        for name, samples in self.samples.items():
            late = samples[len(samples) // 2 :]
            if len(late) > 1:
                slopes[name] = linear_regression(*zip(*late, strict=True)).slope
        return slopes

    def faults(self) -> list[str]:
        """A process that ended, or whose memory grew."""
        faults = [f"process {self.died} ended"] if self.died else []
        for name, slope in self.growth().items():
            late = self.samples[name][len(self.samples[name]) // 2 :]
            gained = slope * (late[-1][0] - late[0][0])
            if gained > _LEAK:
                faults.append(
                    f"memory of {name} grew by {60e-6 * slope:.2f} MB a minute, {gained / 1e6:.0f} "
                    f"MB in the second half; {_LEAK / 1e6:.0f} MB are allowed"
                )
        return faults
