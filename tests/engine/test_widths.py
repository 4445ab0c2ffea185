"""Widths that change in the middle of requests change nothing else; and the real policy chooses."""

import pytest
from demo_answers import tokens
from engines import proposals, running_engine

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}


def widths_of(rid: str) -> list[int]:
    return [len(step["block"]) for step in proposals(rid)]


def test_the_policy_finds_a_useless_drafter_out(random_pair):
    """A random drafter is never right: after a while nearly all steps are plain ones."""
    with running_engine(*random_pair, widths='{"proposers": ["chain"]}') as engine:
        rids = [f"useless-{i}" for i in range(6)]
        for rid in rids:
            engine.generate(
                input_ids=[5, 6, 7], sampling_params=GREEDY | {"max_new_tokens": 100}, rid=rid
            )
    last = widths_of(rids[-1])
    assert last.count(1) > 0.8 * len(last), last


def test_requests_that_come_and_go_do_not_disturb_the_others(measured, alone):
    """The measured policy chooses while batches grow and shrink."""
    aborted, answers = measured["aborted"]
    assert aborted["meta_info"]["finish_reason"]["type"] == "abort"
    assert tokens(answers) == tokens(alone["chats"])[:4]
