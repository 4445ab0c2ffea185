"""What a sweep does when servers and cells fail."""

import re
from typing import ClassVar

import pytest
from bench.serving import fleet, llama
from bench.serving import sweep as sweep_script
from sweep_cells import make_sweep, record

from dflare.errors import DFlareError


class FakeServer:
    """Takes the place of a server process; `broken` arms do not start."""

    broken = ()
    started: ClassVar[list] = []

    def __init__(self, flags, log, env):
        log.write_text("")
        self.name = log.stem.split("-")[0]
        self.env = env
        FakeServer.started.append(self)
        if self.name in FakeServer.broken:
            raise DFlareError(f"it ended; the end of {log}:\nValueError: no GPU here\nbye")

    def stop(self):
        pass


@pytest.fixture
def small_sweep(tmp_path, monkeypatch):
    """Runs `main` for two concurrencies and two repeats; returns its exit status."""
    monkeypatch.setattr(fleet, "Server", FakeServer)
    monkeypatch.setattr(FakeServer, "broken", ())
    monkeypatch.setattr(FakeServer, "started", [])

    def run(measure, **changes):
        sweep = make_sweep(datasets=[{"name": "easy"}], keep_alive=True, **changes)
        (tmp_path / "small.yaml").write_text(sweep.model_dump_json())
        monkeypatch.setattr(sweep_script, "measure", measure)
        with pytest.raises(SystemExit) as ended:
            sweep_script.main([str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out")])
        return ended.value.code

    return run


def measure_well(sweep, cell, server, out):
    return record(**cell.model_dump())


def test_a_crash_costs_one_cell_and_is_tried_again_by_the_next_run(small_sweep, tmp_path, capsys):
    def crash_once(sweep, cell, server, out):
        if (cell.arm, cell.repeat, cell.concurrency) == ("adaptive", 0, 8):
            raise DFlareError("the server ended")
        return measure_well(sweep, cell, server, out)

    assert small_sweep(crash_once) == 1
    assert capsys.readouterr().out.endswith(
        "(INCOMPLETE: 1 cells failed, had errors or were not measured)\n"
    )
    assert "the server ended" in (tmp_path / "out" / "report.md").read_text()
    assert [server.name for server in FakeServer.started].count("adaptive") == 2
    assert (tmp_path / "out" / "adaptive-2.log").exists()
    assert small_sweep(measure_well) == 0
    assert capsys.readouterr().out.endswith("adaptive / best: worst 1.000 at concurrency 1\n")
    assert "What failed" not in (tmp_path / "out" / "report.md").read_text()


def test_a_cell_with_errors_is_measured_again_by_the_next_run(small_sweep):
    def refuse_some(sweep, cell, server, out):
        return measure_well(sweep, cell, server, out) | {"errors": cell.repeat}

    assert small_sweep(refuse_some) == 1
    assert small_sweep(measure_well) == 0


def test_an_arm_that_always_fails_is_given_up_and_the_others_are_measured(small_sweep, capsys):
    def refuse(sweep, cell, server, out):
        if cell.arm == "width 4":
            raise RuntimeError("the load generator gave up")
        return measure_well(sweep, cell, server, out)

    assert small_sweep(refuse) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED, RuntimeError: the load generator gave up") == 3
    assert "width 4 is given up: 3 cells failed in a row" in printed
    assert len(re.findall("adaptive, easy, .*: 10.0 tok/s", printed)) == 4


def test_an_arm_that_does_not_start_is_named_with_the_reason(small_sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeServer, "broken", ("ngram",))
    assert small_sweep(measure_well) == 0  # it is not one that the verdict needs
    text = (tmp_path / "out" / "report.md").read_text()
    assert "- ngram: does not start: it ended; the end of" in text
    assert "ValueError: no GPU here" in text


def test_llama_cpp_is_left_out_where_it_or_its_model_is_missing(small_sweep, tmp_path, monkeypatch):
    """The sweep is whole without it, and says what to install."""
    program = tmp_path / "llama-server"
    arms = [arm.model_dump() for arm in make_sweep().arms]
    arms.append({"name": "llama", "kind": "llama.cpp", "args": ["--model", "no-such.gguf"]})
    monkeypatch.setattr(llama, "PROGRAM", str(program))
    assert small_sweep(measure_well, arms=arms) == 0
    report = tmp_path / "out" / "report.md"
    assert f"- llama: does not start: {program} is not on the PATH" in report.read_text()
    program.write_text("")
    program.chmod(0o755)
    assert small_sweep(measure_well, arms=arms) == 0
    assert "- llama: does not start: no-such.gguf does not exist" in report.read_text()


def test_an_interrupted_sweep_writes_its_report(small_sweep, tmp_path):
    def interrupt(sweep, cell, server, out):
        if cell.concurrency == 8:
            raise KeyboardInterrupt
        return measure_well(sweep, cell, server, out)

    assert small_sweep(interrupt) == 1
    assert "INCOMPLETE" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(("minutes", "kept"), [(1, 1), (17, 2), (25, 3), (None, 3)])
def test_repeats_that_the_time_does_not_hold_are_left_out(
    minutes, kept, small_sweep, tmp_path, monkeypatch, capsys
):
    class Clock:  # each of the 8 cells of a repeat takes a minute
        now = 0.0
        monotonic = staticmethod(lambda: Clock.now)

    def measure(sweep, cell, server, out):
        Clock.now += 60
        return measure_well(sweep, cell, server, out)

    monkeypatch.setattr(sweep_script, "time", Clock)
    assert small_sweep(measure, repeats=3, minutes=minutes) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "out" / "report.md").read_text()
    assert Clock.now == kept * 8 * 60
    said = f"{3 - kept} of 3 would not have ended within {minutes} minutes"
    assert (f"left out: {said}; the same command goes on\n" in printed) == (kept < 3)
    assert (f"- repeats: {said}\n" in text) == (kept < 3)
    assert printed.endswith("adaptive / best: worst 1.000 at concurrency 1\n")


def test_servers_that_do_not_start_are_no_want_of_time(small_sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeServer, "broken", ("none", "width 4", "adaptive", "ngram"))
    assert small_sweep(measure_well, minutes=1) == 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert "- adaptive: does not start" in text
    assert "- repeats:" not in text


def test_servers_take_their_settings_from_the_plan_alone(small_sweep, monkeypatch):
    monkeypatch.setenv("DFLARE_ADAPTIVE", "off")
    monkeypatch.setenv("SGLANG_SIMULATE_ACC_LEN", "3")
    assert small_sweep(measure_well) == 0
    assert all(
        server.env == {"DFLARE_ADAPTIVE": "on", "SGLANG_SIMULATE_ACC_LEN": "-1"}
        for server in FakeServer.started
    )
