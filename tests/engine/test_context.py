"""Rows of plain steps wait for their append no longer than they may, and arrive as they were."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.speculative.base_spec_worker import HiCacheDraftMode, HiCacheDraftPlan

from dflare.engine import context as module
from dflare.engine import worker_start
from dflare.engine.context import ContextAppender

WIDTH = 3  # of the tapped states


class FakeAppend:
    """Stands for the worker's append and writes down the slots of every call."""

    def __init__(self):
        self.calls: list[list[int]] = []
        self.rows: dict[int, tuple[float, int]] = {}

    def __call__(self, states, slots, positions):
        assert states.shape == (len(slots), WIDTH)
        self.calls.append(slots.tolist())
        for state, slot, position in zip(states, slots, positions, strict=True):
            self.rows[int(slot)] = float(state[0]), int(position)


@pytest.fixture
def append():
    return FakeAppend()


def appender(append, *, at_once):
    context = ContextAppender(None, [], [], at_once=at_once)
    context.append = lambda states, *more: append(states[: len(more[0])], *more)
    return context


def plain_step(context, requests, step, padding=0):
    """A plain step as the worker runs it: row i of step s has slot 100 s + i."""
    context.flush(requests)
    bs = len(requests)
    slots = 100 * step + torch.arange(bs)
    hidden = slots[:, None].expand(bs, WIDTH).float() / 2
    padded = torch.cat([hidden, torch.full((padding, WIDTH), torch.nan)])
    context.defer(padded, slots, torch.full((bs,), step))


def slots_of(requests, *steps):
    return [100 * step + i for step in steps for i in range(len(requests))]


def test_rows_wait_while_the_same_requests_take_plain_steps(append):
    context = appender(append, at_once=False)
    for step in range(10):
        plain_step(context, ["a", "b"], step)
    assert append.calls == []


def test_a_batch_that_is_no_plain_step_finds_the_context_complete(append):
    """Before a prefill or a draft `flush` gets no requests; every row keeps its own slot."""
    context = appender(append, at_once=False)
    for step in range(3):
        plain_step(context, ["a", "b"], step)
    context.flush()
    assert append.calls == [slots_of("ab", 0, 1, 2)]
    assert append.rows == {slot: (slot / 2, slot // 100) for slot in append.calls[0]}
    context.flush()
    plain_step(context, ["a", "b"], 3)
    assert len(append.calls) == 1, "a row went twice"


@pytest.mark.parametrize("others", [["a"], ["a", "b", "c"], ["b", "a"], ["a", "c"]])
def test_rows_do_not_wait_for_other_requests(append, others):
    """A request that left has given its slots back: they may be another's from now on."""
    context = appender(append, at_once=False)
    plain_step(context, ["a", "b"], 0)
    plain_step(context, others, 1)
    assert append.calls == [slots_of("ab", 0)]
    context.flush()
    assert append.calls[1] == slots_of(others, 1)


def test_a_request_that_comes_back_has_no_rows_waiting(append):
    """Retracted and prefilled again, it may have the slots of another by then."""
    context = appender(append, at_once=False)
    plain_step(context, ["a"], 0)
    context.flush()  # the prefill
    plain_step(context, ["a"], 1)
    assert append.calls == [slots_of("a", 0)]


def test_fifteen_steps_are_the_most_that_wait(append):
    context = appender(append, at_once=False)
    for step in range(15):
        plain_step(context, ["a"], step)
    assert append.calls == []
    plain_step(context, ["a"], 15)
    assert append.calls == [slots_of("a", *range(15))]
    for step in range(16, 31):
        plain_step(context, ["a"], step)
    assert append.calls[1:] == [slots_of("a", *range(15, 30))]


def test_slots_that_the_scheduler_writes_over_stay_as_they_were(append):
    context = appender(append, at_once=False)
    slots, positions = torch.tensor([7]), torch.tensor([5])
    context.flush(["a"])
    context.defer(torch.ones(1, WIDTH), slots, positions)
    slots.fill_(0)
    positions.fill_(0)
    context.flush()
    assert append.rows == {7: (1.0, 5)}


def test_padding_of_the_states_goes_nowhere(append):
    context = appender(append, at_once=False)
    plain_step(context, ["a", "b"], 0, padding=3)
    context.flush()
    assert append.rows == {0: (0.0, 0), 1: (0.5, 0)}


def test_no_more_waits_than_memory_is_for(append, monkeypatch):
    """Rows of 12 bytes: room for five steps of one request, for one step of three and none."""
    monkeypatch.setattr(module, "_MOST_BYTES", 5 * 12)
    context = appender(append, at_once=False)
    for step in range(6):
        plain_step(context, ["a"], step)
    assert append.calls == [slots_of("a", *range(5))]
    plain_step(context, ["a", "b", "c"], 6)
    assert append.calls[1:] == [slots_of("a", 5), slots_of("abc", 6)]


def test_rows_of_dummy_steps_do_not_stay(append):
    """Steps at start-up are of no request; the next may be of another size."""
    context = appender(append, at_once=False)
    for rows in (1, 4):
        context.defer(torch.ones(rows, WIDTH), torch.arange(rows), torch.arange(rows))
        context.flush()
    assert append.calls == [[0], [0, 1, 2, 3]]


def test_states_that_the_next_graph_overwrites_are_copied(append):
    context = appender(append, at_once=False)
    states, slots = torch.ones(1, WIDTH), torch.tensor([7])
    context.flush(["a"])
    context.defer(states, slots, slots)
    states.fill_(5)
    context.flush()
    assert append.rows == {7: (1.0, 7)}


def test_nothing_waits_where_others_read_the_pool(append):
    context = appender(append, at_once=True)
    for step in range(2):
        plain_step(context, ["a"], step)
        assert append.calls[step:] == [slots_of("a", step)]
    context.flush()
    assert len(append.calls) == 2


@pytest.mark.parametrize(
    ("plan", "disaggregation", "shared"),
    [
        (HiCacheDraftPlan(), "null", False),
        (HiCacheDraftPlan(HiCacheDraftMode.SIDECAR, ("pool",)), "null", True),
        (HiCacheDraftPlan(), "decode", True),
    ],
    ids=["alone", "hicache", "disaggregation"],
)
def test_hicache_and_disaggregation_share_the_pool(monkeypatch, plan, disaggregation, shared):
    monkeypatch.setattr(
        worker_start, "get_disagg", lambda: SimpleNamespace(disaggregation_mode=disaggregation)
    )
    worker = SimpleNamespace(hicache_draft_plan=plan)
    assert worker_start.WorkerStart._pool_is_shared(worker) is shared
