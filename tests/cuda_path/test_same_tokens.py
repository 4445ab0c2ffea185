"""DFLARE on the CUDA device gives the target's own tokens and the reference's drafts.

Graphs, overlap scheduling and changing widths are on; prompts are prefilled in chunks of 64, with
decode steps of other requests in the same batch.
"""

import pytest
from models import TIE, assert_greedy, expected_replays, greedy, prompts
from same_drafts import assert_same_drafts

pytestmark = pytest.mark.slow


def check(result, requests, reference, window=None, mixed=False) -> int:
    """All tokens are the target's, all drafts the reference's; returns accepted draft tokens."""
    accepted = 0
    for request in requests:
        answer = result["answers"][request["rid"]]
        assert_greedy(reference, request["ids"], answer["ids"])
        accepted += assert_same_drafts(
            reference, request["ids"], answer["ids"], answer["proposals"], window, TIE, mixed
        )
    return accepted


def test_the_default_path_of_hopper_runs(dflare, reference):
    """FlashAttention 3 for the target, our operators for the drafter, graphs and overlap."""
    requests = greedy("default", prompts(2, 5, 60, seed=1), 16)
    check(dflare.generate(requests), requests, reference, mixed=True)
    assert dflare.call("attributes", paths=["enable_overlap"]) == [True]
    launches = dflare.call("launches")
    assert launches["sgl_kernel::fwd"] and not launches.get("triton::extend_attention_fwd")
    assert not launches.get("triton::_fwd_kernel")
    assert "Capturing batches (bs=4" in dflare.log()
    assert dflare.call("report")["graph_launches"] > 0


@pytest.mark.parametrize("batch", [1, 3, 4, 7], ids=lambda n: f"batch{n}")
def test_batches_within_and_above_the_captured_sizes(dflare, reference, batch):
    requests = greedy(f"batch{batch}", prompts(batch, 5, 60, seed=batch), 16)
    result = dflare.generate(requests)
    assert all(len(answer["ids"]) == 16 for answer in result["answers"].values())
    check(result, requests, reference, mixed=True)
    assert set(result["widths"]) == {1, 2, 3, 4}
    assert result["replays"] == expected_replays(result)


def test_requests_that_come_and_go(dflare, reference):
    """Batches of one to six and back, prefills between and beside decode steps."""
    requests = [
        request | {"after": 3 * i}
        for i, request in enumerate(greedy("come", prompts(6, 5, 150, seed=20), 16))
    ]
    check(dflare.generate(requests), requests, reference, mixed=True)


def test_radix_hits_in_prompts_and_answers(dflare, reference):
    first = greedy("radix", prompts(3, 80, 120, seed=30), 16)
    answers = dflare.generate(first)["answers"]
    turns = [r["ids"] + answers[r["rid"]]["ids"] + [7, 8, 9] for r in first]
    shared = [first[0]["ids"][:70] + tail for tail in prompts(2, 3, 30, seed=31)]
    again = greedy("again", [*turns, *shared], 12)
    result = dflare.generate(again)
    check(result, again, reference, mixed=True)
    for request, turn in zip(again, turns, strict=False):
        cached = result["answers"][request["rid"]]["cached"]
        assert cached >= len(turn) - 5, f"{cached} of {len(turn)} tokens were cached"
    assert all(result["answers"][r["rid"]]["cached"] >= 70 for r in again[3:])


def test_aborted_requests_leave_the_others_alone(dflare, reference):
    requests = greedy("abort", prompts(3, 10, 60, seed=40), 24)
    requests[1] |= {"abort_after": 12}
    result = dflare.generate(requests)
    doomed = result["answers"]["abort-1"]
    assert doomed["finish"]["type"] == "abort" and 12 <= len(doomed["ids"]) < 24
    check(result, [requests[0], requests[2]], reference, mixed=True)
    # What the radix cache keeps of the aborted one is right too.
    follow = greedy("follow", [requests[1]["ids"] + doomed["ids"][:10]], 10)
    check(dflare.generate(follow), follow, reference, mixed=True)
