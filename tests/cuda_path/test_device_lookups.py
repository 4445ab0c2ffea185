"""Look-ups on the CUDA device: exact under overlap, in any legal order, without a wait."""

import pytest
from models import check_waits_and_races, repeating
from scheduler_process import running_scheduler
from test_lookups import check_proposals

pytestmark = pytest.mark.slow

LOOK_UPS = [["lookup", 4], 1, ["lookup", 3], ["lookup", 2]]
ALL_ARMS = [3, ["lookup", 4], ["spliced", 4], 1, 1, ["lookup", 2], 4, ["spliced", 3]]
FLAGS = {"chunked_prefill_size": 64, "enable_mixed_chunk": True}


@pytest.fixture(scope="module")
def requests():
    return repeating("look", 5)


@pytest.fixture(scope="module")
def scheduler(pair):
    with running_scheduler(*pair, widths=ALL_ARMS + LOOK_UPS, **FLAGS) as scheduler:
        yield scheduler


def found(result, requests) -> int:
    """Every proposal is what the request's own text says; how many steps proposed something."""
    return sum(
        check_proposals(
            [request["ids"]],
            [{"output_ids": result["answers"][request["rid"]]["ids"]}],
            [result["answers"][request["rid"]]["proposals"]],
        )
        for request in requests
    )


def test_proposals_are_what_the_text_says(scheduler, requests):
    scheduler.call("take", turns=LOOK_UPS)
    result = scheduler.generate(requests)
    assert found(result, requests) > 5
    again = [request | {"rid": f"again-{request['rid']}"} for request in requests]
    result = scheduler.generate(again)
    assert found(result, again) > 5
    assert any(result["answers"][r["rid"]]["cached"] > 10 for r in again)
    scheduler.call("flush_cache")
    scheduler.call("set_order", seed=3)
    assert found(scheduler.generate(requests), requests) > 5
    scheduler.call("set_order", seed=None)


def test_every_arm_gives_the_targets_tokens_and_adds_no_wait(scheduler, reference, requests):
    scheduler.call("take", turns=ALL_ARMS)
    check_waits_and_races(scheduler, requests, reference)
