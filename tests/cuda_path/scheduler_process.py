"""Schedulers for tests: each in a process of its own, forked from one that has all loaded."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import psutil

_HERE = Path(__file__).parent
_START_SECONDS = 400
# The longest that a command of a scheduler may take; one that captures an 8B's graphs, minutes.
_ANSWER_SECONDS = 900


class DeviceError(AssertionError):
    """What a scheduler's process raised or died of; the text holds its traceback and log."""


class Zygote:
    """The process from which schedulers are forked."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cuda-path-")
        self._socket = f"{self._folder.name}/socket"
        self._logs = 0
        path = Path(self._folder.name) / "zygote.log"
        # The environment of the run, without what would make SGLang or OpenMP take more cores.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with path.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(_HERE / "zygote.py"), self._socket],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not os.path.exists(self._socket):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise DeviceError(f"the device did not start:\n{path.read_text()[-8000:]}")
            time.sleep(0.05)

    def fork(self) -> "Remote":
        """A child that waits to be told what to do."""
        self._logs += 1
        log = Path(self._folder.name) / f"{self._logs}.log"
        log.touch()
        connection = Client(self._socket, family="AF_UNIX")
        connection.send(str(log))
        return Remote(connection, log)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


class Remote:
    """One scheduler of another process; its methods are those of `InProcessScheduler`."""

    def __init__(self, connection: Connection, log: Path) -> None:
        self._connection, self._log = connection, log
        self._pid = connection.recv()

    def send(self, method: str, **arguments: Any) -> None:
        self._connection.send((method, arguments))

    def receive(self) -> Any:
        """The answer to the last `send`.

        Raises:
            DeviceError: the method raised, the process died, or it took too long.
        """
        if not self._connection.poll(_ANSWER_SECONDS):
            raise DeviceError(f"no answer in {_ANSWER_SECONDS} s\n{self._tail()}")
        try:
            state, value = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise DeviceError(f"the scheduler's process died\n{self._tail()}") from error
        if state != "ok":
            raise DeviceError(f"{value}\n{self._tail()}")
        return value

    def call(self, method: str, **arguments: Any) -> Any:
        self.send(method, **arguments)
        return self.receive()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _tail(self) -> str:
        return "log of its process:\n" + self.log()[-4000:]

    def close(self) -> None:
        self._connection.close()
        try:
            process = psutil.Process(self._pid)
            for child in process.children(recursive=True):
                child.kill()
            process.kill()
        except psutil.NoSuchProcess:
            pass


_zygotes: list[Zygote] = []


def zygote() -> Zygote:
    """The test run's own, started when it is first needed."""
    if not _zygotes:
        _zygotes.append(Zygote())
    return _zygotes[0]


def close_zygote() -> None:
    while _zygotes:
        _zygotes.pop().close()


_totals: Counter[str] = Counter()
_waits: Counter[str] = Counter()


def summary() -> list[str]:
    """Lines on what the devices of all schedulers of this run did."""
    if not _totals:
        return []
    lines = [", ".join(f"{count} {name.replace('_', ' ')}" for name, count in _totals.items())]
    lines += [f"host waits: {count} {site}" for site, count in _waits.most_common()]
    return lines


class Scheduler:
    """One scheduler, or a group of tensor-parallel ranks that is driven as one."""

    def __init__(self, ranks: list[Remote]) -> None:
        self.ranks = ranks
        self.failed = False

    def all(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method on every rank at once; the answers by rank."""
        for rank in self.ranks:
            rank.send(method, **arguments)
        try:
            return [rank.receive() for rank in self.ranks]
        except DeviceError:
            self.failed = True
            raise

    def generate(self, requests: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Run requests to their end; see `InProcessScheduler.generate`."""
        result = self.all("generate", requests=requests, **more)[0]
        for (operation, *callers), count in result["waits"].items():
            _waits[f"{operation} at {' < '.join(callers[:2])}"] += count
        return result

    def call(self, method: str, **arguments: Any) -> Any:
        return self.all(method, **arguments)[0]

    def log(self) -> str:
        return self.ranks[0].log()


@contextmanager
def running_scheduler(
    target: Path, draft: Path | None = None, ranks: int = 1, **arguments: Any
) -> Iterator[Scheduler]:
    """A scheduler of SGLang on the device, in a process of its own.

    Args:
        target, draft, arguments: Of `InProcessScheduler`.
        ranks: Tensor-parallel ranks, each a process.
    """
    with ExitStack() as stack:
        remotes = [zygote().fork() for _ in range(ranks)]
        for remote in remotes:
            stack.callback(remote.close)
        port = _free_port()
        for rank, remote in enumerate(remotes):
            remote.send(
                "start",
                target=str(target),
                draft=str(draft) if draft else None,
                rank=rank,
                ranks=ranks,
                port=port,
                **arguments,
            )
        for remote in remotes:
            remote.receive()
        scheduler = Scheduler(remotes)
        yield scheduler
        if scheduler.failed:
            return
        _totals["schedulers"] += 1
        for name, count in scheduler.call("report").items():
            _totals[name] += count


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
