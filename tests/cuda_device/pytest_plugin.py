"""Runs the tests of a folder on the test device, in a process of their own.

The device must be loaded before torch, which the process that collects all tests has long done. So
this plugin has two sides. In the outer process `run_elsewhere` hands each test to one inner pytest,
which is started at the first of them; its reports become the outer ones. In the inner process
(`pytest -p cuda_device.pytest_plugin`, also for a debugger) the device is loaded at once and tests
run as ever, fixtures included.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
_INNER = "DFLARE_TEST_DEVICE_INNER"


class InnerSession:
    """A pytest that runs the tests it is told to, on the device."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - close() does
        orders, self._orders = os.pipe()
        self._reports, reports = os.pipe()
        environment = {**os.environ, _INNER: f"{orders},{reports}"}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-p", "cuda_device.pytest_plugin", "-q"]
        command += [f"--rootdir={config.rootpath}", "-p", "no:cacheprovider", str(folder)]
        self._process = subprocess.Popen(
            command,
            env=environment,
            cwd=config.rootpath,
            pass_fds=(orders, reports),
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        os.close(orders)
        os.close(reports)
        self._input = os.fdopen(self._reports)
        self._output = os.fdopen(self._orders, "w")

    def run(self, item: pytest.Item, following: str | None) -> None:
        """Runs one test and passes its reports on."""
        try:
            print(json.dumps([_inner_id(item), following]), file=self._output, flush=True)
            while line := self._input.readline():
                data = json.loads(line)
                if data is None:
                    return
                report = self._config.hook.pytest_report_from_serializable(
                    config=self._config, data=data
                )
                report.nodeid = item.nodeid
                item.ihook.pytest_runtest_logreport(report=report)
        except BrokenPipeError:
            pass
        # The process has ended, by a crash or because it could not start: its output says why.
        self._process.wait()
        self._log.seek(0)
        text = (
            f"the tests' process on the device ended with {self._process.returncode}:\n"
            f"{self._log.read()[-6000:]}"
        )
        report = pytest.TestReport(
            item.nodeid, item.location, {}, "failed", text, "call", duration=0, start=0, stop=0
        )
        item.ihook.pytest_runtest_logreport(report=report)
        _sessions.pop(self._folder, None)

    def close(self) -> None:
        self._output.close()
        self._process.wait()
        self._input.close()
        self._log.close()


def _inner_id(item: pytest.Item) -> str:
    """The test's id without the group that xdist adds."""
    group = item.get_closest_marker("xdist_group")
    return item.nodeid.removesuffix(f"@{group.args[0]}") if group else item.nodeid


_sessions: dict[Path, InnerSession] = {}


def run_elsewhere(item: pytest.Item, nextitem: pytest.Item | None, folder: Path) -> bool:
    """For the hook pytest_runtest_protocol of a folder's conftest.py; true if it ran the test.

    pytest asks every conftest that it has loaded about every test, not only those beside it.
    """
    if "DFLARE_TEST_DEVICE_HERE" in os.environ or not item.path.is_relative_to(folder):
        return False
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    if folder not in _sessions:
        _sessions[folder] = InnerSession(item.config, folder)
    here = nextitem is not None and nextitem.path.is_relative_to(folder)
    _sessions[folder].run(item, _inner_id(nextitem) if here and nextitem else None)
    if not here and folder in _sessions:
        _sessions.pop(folder).close()
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


# ---------------------------------------------------------------- the inner process


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    os.environ["DFLARE_TEST_DEVICE_HERE"] = "1"
    import cuda_device

    cuda_device.load()
    if _INNER in os.environ:
        early_config.pluginmanager.register(_Obeying(*map(int, os.environ.pop(_INNER).split(","))))


class _Obeying:
    """Runs the tests that the outer process names, instead of all that were collected."""

    def __init__(self, orders: int, reports: int) -> None:
        self._orders, self._reports = os.fdopen(orders), os.fdopen(reports, "w")
        for descriptor in (orders, reports):
            os.set_inheritable(descriptor, False)

    def _send(self, data: Any) -> None:
        print(json.dumps(data), file=self._reports, flush=True)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for line in self._orders:
            nodeid, following = json.loads(line)
            item, nextitem = items[nodeid], items.get(following)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
            self._send(None)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        config = self._config
        self._send(config.hook.pytest_report_to_serializable(config=config, report=report))

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config
