"""Look-ups on the CUDA device: exact under overlap, in any legal order, without a wait."""

import pytest
from models import assert_greedy, greedy, prompts
from scheduler_process import running_scheduler
from test_lookups import check_proposals

pytestmark = pytest.mark.slow

LOOK_UPS = [["lookup", 4], 1, ["lookup", 3], ["lookup", 2]]
ALL_ARMS = [3, ["lookup", 4], ["spliced", 4], 1, 1, ["lookup", 2], 4, ["spliced", 3]]
FLAGS = {"chunked_prefill_size": 64, "enable_mixed_chunk": True}


@pytest.fixture(scope="module")
def requests():
    """Texts that repeat themselves; some come later, beside steps of the others."""
    ids = [x + x[: len(x) // 2] for x in prompts(5, 20, 90, seed=50)]
    return [
        request | {"after": 4 * max(0, i - 2)} for i, request in enumerate(greedy("look", ids, 24))
    ]


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


def test_proposals_are_what_the_text_says(pair, requests):
    with running_scheduler(*pair, widths=LOOK_UPS, **FLAGS) as scheduler:
        result = scheduler.generate(requests)
        assert found(result, requests) > 5
        again = [request | {"rid": f"again-{request['rid']}"} for request in requests]
        result = scheduler.generate(again)
        assert found(result, again) > 5
        assert any(result["answers"][r["rid"]]["cached"] > 10 for r in again)
        scheduler.call("flush_cache")
        scheduler.call("set_order", seed=3)
        assert found(scheduler.generate(requests), requests) > 5


def test_every_arm_gives_the_targets_tokens_and_adds_no_wait(pair, reference, requests):
    with running_scheduler(*pair, widths=ALL_ARMS, **FLAGS) as scheduler:
        scheduler.generate(requests)
        scheduler.call("flush_cache")
        result = scheduler.generate(requests, count_waits=True)
        for request in requests:
            assert_greedy(reference, request["ids"], result["answers"][request["rid"]]["ids"])
        waits = [
            site for site in result["waits"] if any("forward_batch_generation" in c for c in site)
        ]
        assert not waits, waits[:3]
        scheduler.call("flush_cache")
        races = scheduler.generate(requests, watch_races=True)["races"]
        assert not races, "\n".join(races[:5])
