"""Bugs that are put in on purpose are found, and by what: the table of docs/testing.md.

Each runs in a scheduler of its own: at once, with the check for races, and in random legal orders.
The healthy engine passes all three (test_same_tokens, test_orders).
"""

from contextlib import ExitStack

import pytest
from models import TIE, assert_greedy, expected_replays, greedy, prompts
from same_drafts import assert_same_drafts
from scheduler_process import DeviceError, Scheduler, running_scheduler

pytestmark = pytest.mark.slow

WIDTHS = [3, 1, 4, 2, 1, 1]
SEEDS = (1, 2, 3)
# How a bug shows: an error while starting, a wrong answer or an error in a run at once or in an
# order of the device's work, a wait of the host in our code, accesses that nothing orders or to
# memory that a graph lost, a step that ran without its graphs.
START, AT_ONCE, ORDER, WAITS, RACES = "start", "at once", "order", "waits", "races"
EAGER = "eager"
FOUND_BY = {
    None: set(),
    "wait_during_capture": {START},
    "schedule_outside_the_graph": {RACES},
    "buffer_shared_between_widths": {AT_ONCE},
    "targets_backend_left_in_place": {AT_ONCE},
    "targets_graphs_left_in_place": {EAGER},
    "drafters_graphs_left_in_place": {EAGER},
    "sampler_left_in_place": {AT_ONCE},
    "host_waits_in_plain_step": {WAITS},
    "no_wait_for_scheduler": {ORDER, RACES},
    "results_read_too_early": {ORDER, RACES},
    "staging_buffer_reused": {ORDER, RACES},
}
# In the short run: one that is found by an order and by the clocks.
SHORT = ("no_wait_for_scheduler",)


@pytest.mark.parametrize(
    "name",
    [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in FOUND_BY],
)
def test_a_planted_bug_is_found(pair, reference, name):
    assert found_by(pair, reference, name) == FOUND_BY[name]


def found_by(pair, reference, plant: str | None) -> set[str]:
    """By which of the ways the bug is found; the others are not tried after a wrong run at once."""
    requests = greedy("plant", prompts(3, 5, 60, seed=110), 14)
    requests += [r | {"after": 6} for r in greedy("later", prompts(2, 5, 40, seed=111), 8)]
    with ExitStack() as stack:
        try:
            scheduler = stack.enter_context(running_scheduler(*pair, widths=WIDTHS, plant=plant))
        except DeviceError as error:
            print(error)
            return {START}
        return _found_in_runs(scheduler, requests, reference)


def _found_in_runs(scheduler: Scheduler, requests, reference) -> set[str]:
    result, fault = run(scheduler, requests, reference, count_waits=True)
    print("at once:", fault)
    if fault:
        return {AT_ONCE}
    found = set()
    if result["replays"] != expected_replays(result):
        found.add(EAGER)
    if any("dflare" in call for site in result["waits"] for call in site[1:3]):
        found.add(WAITS)
    scheduler.call("flush_cache")
    result, fault = run(scheduler, requests, reference, watch_races=True)
    if fault:
        print("at once, again:", fault[:2000])
        return {AT_ONCE}
    if result["races"]:
        print("races:", *result["races"][:5], sep="\n")
        found.add(RACES)
    for seed in SEEDS:
        scheduler.call("flush_cache")
        scheduler.call("set_order", seed=seed)
        _, fault = run(scheduler, requests, reference)
        if fault:
            print(f"order {seed}:", fault[:2000])
            found.add(ORDER)
            break
    return found


def run(scheduler: Scheduler, requests, reference, **more) -> tuple[dict, str]:
    """The result, and what is wrong with it, empty if nothing is."""
    try:
        result = scheduler.generate(requests, **more)
    except DeviceError as error:
        return {}, str(error)
    try:
        for request in requests:
            answer = result["answers"][request["rid"]]
            assert_greedy(reference, request["ids"], answer["ids"])
            assert_same_drafts(
                reference, request["ids"], answer["ids"], answer["proposals"], tie=TIE
            )
    except AssertionError as error:
        return result, str(error) or "a wrong answer"
    return result, ""
