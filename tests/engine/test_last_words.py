"""Why a server ends is its last line, and it does end when it fails on everybody."""

import logging
import multiprocessing
from types import SimpleNamespace

import pytest

from dflare.engine import failed_step


@pytest.fixture(autouse=True)
def serving_with_dflare(monkeypatch):
    monkeypatch.setattr(failed_step, "is_active", lambda: True)


def fail_in_the_scheduler():
    batch = SimpleNamespace(reqs=[SimpleNamespace(rid="a"), SimpleNamespace(rid="b")])
    failed_step._leave_cause(batch, ValueError("index out of range\nmore"))


def end(processes=()):
    """The signal handler of a server whose watchdog knows these processes."""
    watchdog = SimpleNamespace(
        _processes=list(processes), _names=["scheduler"] * len(processes), stop=lambda: None
    )
    manager = SimpleNamespace(
        _subprocess_watchdog=watchdog, dump_requests_before_crash=lambda: None
    )

    def original(_handler):
        logging.getLogger("sglang").error("after the last line")

    try:
        failed_step._end(original, SimpleNamespace(tokenizer_manager=manager))
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_last_line_names_requests_and_cause(caplog, method):
    scheduler = multiprocessing.get_context(method).Process(target=fail_in_the_scheduler)
    scheduler.start()
    scheduler.join()
    assert scheduler.exitcode == 0
    end()
    expected = "DFLARE: the server ends: a step of a, b failed: ValueError: index out of range"
    assert [record.getMessage() for record in caplog.records][-1] == expected
    end()
    assert "a, b" not in caplog.messages[-1], "a cause is told once"


def test_the_last_line_names_a_process_that_died(caplog):
    dead = SimpleNamespace(is_alive=lambda: False, pid=7, exitcode=-9)
    end([dead])
    assert caplog.messages[-1].endswith("process scheduler (7) ended with exit code -9")


def test_a_step_that_is_not_contained_leaves_its_cause(monkeypatch):
    monkeypatch.setattr(failed_step, "_can_go_on", lambda *_: False)
    left = []
    monkeypatch.setattr(failed_step, "_leave_cause", lambda _batch, error: left.append(str(error)))

    def step(_scheduler, _batch):
        raise ValueError("again")

    with pytest.raises(ValueError, match="again"):
        failed_step._run_batch(step, SimpleNamespace(), SimpleNamespace(reqs=[]))
    assert left == ["again"]


@pytest.mark.parametrize(("failures", "goes_on"), [(0, True), (2, True), (3, False)])
def test_three_requests_that_fail_alone_are_enough(monkeypatch, failures, goes_on):
    from sglang.srt import runtime_context
    from sglang.srt.disaggregation.utils import DisaggregationMode

    ranks = SimpleNamespace(tp_size=1, pp_size=1, dp_size=1)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: ranks)
    scheduler = SimpleNamespace(
        enable_overlap=False, disaggregation_mode=DisaggregationMode.NULL, dflare_failures=failures
    )
    assert failed_step._can_go_on(scheduler, ValueError()) == goes_on
    assert not failed_step._can_go_on(scheduler, MemoryError())
    ranks.tp_size = 2
    assert not failed_step._can_go_on(scheduler, ValueError())


def test_a_request_that_ends_well_starts_the_count_again():
    scheduler = SimpleNamespace(dflare_failures=2)
    running, finished = (SimpleNamespace(finished=lambda end=end: end) for end in (False, True))
    for reqs, left in (([running], 2), ([running, finished], 0)):
        failed_step._process_batch_result(
            lambda *_: None, scheduler, SimpleNamespace(reqs=reqs), object()
        )
        assert scheduler.dflare_failures == left
