"""The servers of a sweep: all at once, or one at a time."""

import re
from collections import Counter
from pathlib import Path

from bench.serving.llama import LlamaServer
from bench.serving.plan import Arm, Sweep
from bench.serving.server import BenchServer, Server
from dflare.adaptive.config import VARIABLE
from dflare.errors import DFlareError

_FAILURES = 3  # in a row, after which an arm is given up


class Fleet:
    """Starts servers when they are asked for, again after a crash, and gives hopeless arms up.

    Attributes:
        given_up: Arms that do not start, or whose cells fail one after the other, with the reason.
    """

    def __init__(self, sweep: Sweep, out: Path):
        """
        Args:
            sweep: The plan.
            out: Folder of the servers' logs, `<arm>.log`, `<arm>-2.log` and so on.
        """
        self._sweep = sweep
        self._out = out
        self._running: dict[str, BenchServer] = {}
        self._failures: Counter[str] = Counter()
        self.given_up: dict[str, str] = {}

    def get(self, name: str) -> BenchServer | None:
        """The running server of an arm, started if need be; None for an arm that is given up."""
        if name in self.given_up:
            return None
        if name not in self._running:
            if not self._sweep.keep_alive:
                self.stop()
            arm = next(arm for arm in self._sweep.arms if arm.name == name)
            print(f"starting {name}", flush=True)
            try:
                self._running[name] = self._start(arm)
            except DFlareError as error:
                self._give_up(name, f"does not start: {reason_of(error)}")
                return None
        return self._running[name]

    def worked(self, name: str) -> None:
        """A cell of this arm was measured."""
        self._failures[name] = 0

    def failed(self, name: str, reason: str) -> None:
        """A cell of this arm failed: its server ends, and the next cell gets a new one."""
        self._running.pop(name).stop()
        self._failures[name] += 1
        if self._failures[name] == _FAILURES:
            self._give_up(name, f"{_FAILURES} cells failed in a row: {reason}")

    def stop(self) -> None:
        """End all servers."""
        for server in self._running.values():
            server.stop()
        self._running.clear()

    def _give_up(self, name: str, reason: str) -> None:
        self.given_up[name] = reason
        print(f"{name} is given up: {reason}", flush=True)

    def _log(self, name: str) -> Path:
        """A file that does not exist yet: the log of a crash is worth more than a short name."""
        path, number = self._out / f"{name}.log", 1
        while path.exists():
            number += 1
            path = self._out / f"{name}-{number}.log"
        return path

    def _start(self, arm: Arm) -> BenchServer:
        target, draft = self._sweep.pair(self._out)
        if arm.kind == "llama.cpp":
            return LlamaServer(arm.args, target, self._log(arm.name))
        flags = ["--model-path", target, *self._sweep.server_args]
        # A server that waits must not take the processor from the one that is measured.
        flags += ["--sleep-on-idle"] if self._sweep.keep_alive else []
        flags += [arg.format(draft=draft) for arg in arm.args]
        return Server(flags, self._log(arm.name), self._env(arm))

    def _env(self, arm: Arm) -> dict[str, str]:
        """What the plan says, and nothing of what this process inherited by chance."""
        simulated = self._sweep.simulate_acc_len
        own = {VARIABLE: "on", "SGLANG_SIMULATE_ACC_LEN": str(simulated or -1)}
        return own | arm.env


def reason_of(error: Exception) -> str:
    """One line for a table: what failed, and the last exception that a quoted log names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines[1:] if re.match(r"[\w.]*(Error|Exception)\b", line)]
    text = " ".join([*lines[:1], *named[-1:]])
    kind = "" if isinstance(error, DFlareError) else f"{type(error).__name__}: "
    return f"{kind}{text}"[:400].replace("|", "/")
