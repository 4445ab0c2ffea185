"""Work that waits in its stream's queue and then runs in a random legal order changes nothing.

No two accesses to the same memory are in order by luck alone.
"""

import pytest
from models import greedy, prompts

pytestmark = pytest.mark.slow

SEEDS = [1, 2]
MORE_SEEDS = range(3, 21)


@pytest.fixture(scope="module")
def requests():
    first = greedy("order", prompts(3, 5, 90, seed=100), 24)
    later = greedy("later", prompts(3, 5, 40, seed=101), 12)
    return first + [request | {"after": 6} for request in later]


@pytest.fixture(scope="module")
def at_once(dflare, requests):
    return dflare.generate(requests)["answers"]


def test_streams_and_events_order_all_accesses(dflare, requests, at_once):
    dflare.call("flush_cache")
    result = dflare.generate(requests, watch_races=True)
    assert not result["races"], "\n".join(result["races"][:5])
    for request in requests:
        assert result["answers"][request["rid"]]["ids"] == at_once[request["rid"]]["ids"]


@pytest.mark.parametrize(
    "seed", [*SEEDS, *(pytest.param(s, marks=pytest.mark.long) for s in MORE_SEEDS)]
)
def test_a_legal_order_changes_no_token_and_no_draft(dflare, requests, at_once, seed):
    # Without the cache of an earlier run, whose hits would change the batches.
    dflare.call("flush_cache")
    dflare.call("set_order", seed=seed)
    try:
        answers = dflare.generate(requests)["answers"]
    finally:
        dflare.call("set_order", seed=None)
    for request in requests:
        rid = request["rid"]
        assert answers[rid]["ids"] == at_once[rid]["ids"], rid
        assert answers[rid]["finish"]["type"] == "length"
