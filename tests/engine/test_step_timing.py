"""What a decode step's table and trace count, and what they leave out."""

import errno
import io
import json
import os
import shutil
import time
from types import SimpleNamespace

import pytest

from dflare.engine import step_timing
from dflare.engine.step_timing import StepTimer
from dflare.errors import DFlareError


class Clock:
    """Stands for time.perf_counter; functions of the step under test let it run."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def taking(self, seconds, result=None):
        def function(*_args, **_kwargs):
            self.now += seconds
            return result

        return function


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def batch_of(requests, *, extend=False, mixed=False, idle=False):
    mode = SimpleNamespace(is_extend=lambda: extend, is_idle=lambda: idle)
    return SimpleNamespace(reqs=["r"] * requests, forward_mode=mode, is_extend_in_batch=mixed)


class Worker:
    """A step of known times: 2 ms between the parts, and each part as given."""

    def __init__(self, timer, clock, **milliseconds):
        self.clock = clock
        parts = {"draft": 4, "verify": 8, "sampling": 1, "append": 0.5} | milliseconds
        self.parts = [
            timer.wrap(part, clock.taking(1e-3 * parts[part]))
            for part in ("draft", "verify", "sampling", "append")
        ]
        self.width = 4
        self.forward = timer.step(self._forward)

    def _forward(self, _batch):
        for part in self.parts[self.width == 1 :]:
            part()
        self.clock.now += 2e-3
        return SimpleNamespace(speculative_num_draft_tokens=self.width)


class FullDisk(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rows(timer):
    header, _, *lines = timer.table().splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    return [dict(zip(names, map(float, line.strip("|").split("|")), strict=True)) for line in lines]


def events(folder):
    (file,) = folder.glob("trace-*.json")
    return [event for event in json.loads(file.read_text()) if event["ph"] == "X"]


def test_the_parts_of_a_step_add_up(tmp_path, clock):
    timer = StepTimer(tmp_path, "cpu")
    worker = Worker(timer, clock)
    for _ in range(3):
        worker.forward(batch_of(2))
        clock.now += 3e-3
    assert rows(timer) == [
        {"batch": 2, "width": 4, "steps": 2, "draft": 4, "verify": 8, "sampling": 1}
        | {"append": 0.5, "schedule": 3, "other": 2, "step": 18.5, "step / verify": 2.31}
    ]


def test_each_batch_size_and_width_has_a_row_of_its_own(tmp_path, clock):
    timer = StepTimer(tmp_path, "cpu")
    worker = Worker(timer, clock)
    for requests, width in [(1, 4), (1, 1), (1, 1), (2, 4), (1, 4)]:
        worker.width = width
        worker.forward(batch_of(requests))
    table = rows(timer)
    assert [(row["batch"], row["width"], row["steps"]) for row in table] == [
        (1, 1, 2),
        (1, 4, 1),
        (2, 4, 1),
    ]
    assert [row["draft"] for row in table] == [0, 4, 4]


def test_appends_of_some_steps_only_are_averaged(tmp_path, clock):
    timer = StepTimer(tmp_path, "cpu")
    append = timer.wrap("append", clock.taking(16e-3))
    verify = timer.wrap("verify", clock.taking(2e-3))
    count = iter(range(17))

    def forward(_batch):
        if next(count) % 16 == 0:
            append()
        verify()
        return SimpleNamespace(speculative_num_draft_tokens=1)

    step = timer.step(forward)
    for _ in range(17):
        step(batch_of(1))
    (row,) = rows(timer)
    assert row["append"] == 1.0
    assert row["step"] == 2.0


@pytest.mark.parametrize("other", [{"extend": True}, {"mixed": True}, {"idle": True}])
def test_only_decode_steps_are_recorded(tmp_path, clock, other):
    """Prefills and start-up's dummy steps call the same functions."""
    timer = StepTimer(tmp_path, "cpu")
    worker = Worker(timer, clock)
    for part in worker.parts:
        part()
    worker.forward(batch_of(1, **other))
    worker.forward(batch_of(1))
    assert rows(timer) == [], "a step behind a prefill does not know its scheduling time"
    assert [event["name"] for event in events(tmp_path)] == [
        *("draft", "verify", "sampling", "append", "step")
    ]
    worker.forward(batch_of(1))
    assert [row["steps"] for row in rows(timer)] == [1]


def test_a_part_inside_another_counts_once(tmp_path, clock):
    timer = StepTimer(tmp_path, "cpu")
    inner = timer.wrap("sampling", clock.taking(5e-3, result="token"))
    outer = timer.wrap("sampling", lambda: inner())
    verify = timer.wrap("verify", clock.taking(5e-3))

    def forward(_batch):
        verify()
        assert outer() == "token"
        return SimpleNamespace(speculative_num_draft_tokens=1)

    step = timer.step(forward)
    for _ in range(2):
        step(batch_of(1))
    assert rows(timer)[0]["sampling"] == 5.0


def test_what_writing_takes_is_no_steps_schedule(tmp_path, clock, monkeypatch):
    timer = StepTimer(tmp_path, "cpu")
    worker = Worker(timer, clock)
    monkeypatch.setattr(step_timing, "_replace", clock.taking(0.5))
    for _ in range(3):
        worker.forward(batch_of(1))
        clock.now += 1.1
    assert rows(timer)[0]["schedule"] == pytest.approx(1100)


def test_the_trace_is_complete_after_every_step_and_only_grows(tmp_path, clock):
    timer = StepTimer(tmp_path, "cpu")
    worker = Worker(timer, clock)
    (file,) = tmp_path.glob("trace-*.json")
    before = b""
    for step in range(1, 4):
        worker.forward(batch_of(2))
        content = file.read_bytes()
        assert content.startswith(before.removesuffix(b"\n]\n"))
        before = content
        steps = [event for event in events(tmp_path) if event["name"] == "step"]
        assert len(steps) == step
    assert steps[-1]["args"] == {"batch": 2, "width": 4}
    assert steps[-1]["dur"] == pytest.approx(15.5e3)
    inside = [event for event in events(tmp_path) if event["name"] not in ("step", "schedule")]
    assert len(inside) == 12
    for event in inside:
        assert any(
            step["ts"] <= event["ts"] + 0.1
            and event["ts"] + event["dur"] <= step["ts"] + step["dur"] + 0.1
            for step in steps
        )


def test_memory_does_not_grow_with_the_steps(tmp_path, clock):
    timer = StepTimer(tmp_path, "cpu")
    worker = Worker(timer, clock)
    for _ in range(300):
        worker.forward(batch_of(1))
    assert rows(timer)[0]["steps"] == 256
    assert timer._trace._new == []


def test_the_table_file_follows_the_steps(tmp_path, clock):
    timer = StepTimer(tmp_path, "cpu")
    worker = Worker(timer, clock)
    for _ in range(100):
        worker.forward(batch_of(1))
    (file,) = tmp_path.glob("steps-*.md")
    assert "| 1 | 4 | 66 |" in file.read_text(), "written one second after the first step"
    assert timer.table().splitlines()[-1].startswith("| 1 | 4 | 99 |")


def test_a_folder_that_cannot_be_is_refused_by_name(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DFlareError, match=rf"DFLARE_STEP_TRACE={file}.*expected a folder"):
        StepTimer(file, "cpu")


def test_a_folder_that_vanishes_ends_the_trace_and_not_the_server(tmp_path, clock, caplog):
    folder = tmp_path / "trace"
    timer = StepTimer(folder, "cpu")
    worker = Worker(timer, clock)
    shutil.rmtree(folder)
    for _ in range(300):
        worker.forward(batch_of(1))
    assert [
        record.getMessage() for record in caplog.records if "no more" in record.getMessage()
    ] == [
        f"DFLARE: no more step times in {folder}: [Errno 2] No such file or directory: "
        f"'{timer._table_path.with_suffix('.new')}'"
    ]
    assert timer._trace._new == [], "nothing piles up"


def test_a_full_disk_ends_the_trace_and_not_the_server(tmp_path, clock, caplog):
    timer = StepTimer(tmp_path, "cpu")
    worker = Worker(timer, clock)
    timer._trace._file = FullDisk()
    for _ in range(3):
        worker.forward(batch_of(1))
    assert caplog.text.count("No space left on device") == 1
    assert timer._trace._new == []


def test_a_step_that_fails_leaves_the_timer_as_it_was(tmp_path, clock):
    timer = StepTimer(tmp_path, "cpu")
    worker = Worker(timer, clock)

    def fail():
        raise ValueError("once")

    part, worker.parts[0] = worker.parts[0], timer.wrap("draft", fail)
    with pytest.raises(ValueError, match="once"):
        worker.forward(batch_of(1))
    worker.parts[0] = part
    for _ in range(2):
        worker.forward(batch_of(1))
    assert rows(timer)[0]["draft"] == 4
