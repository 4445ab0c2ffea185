"""Widths that change in the middle of requests change nothing else; and the real policy chooses."""

import asyncio

import pytest
from engines import TURNS, proposals, running_engine
from prompts import chat_prompts
from test_same_drafts import check, random_prompts
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}


def widths_of(rid: str) -> list[int]:
    return [len(step["block"]) for step in proposals(rid)]


def test_every_request_meets_many_widths(random_pair, random_reference):
    """Other tests rely on it: the harness does change widths within requests."""
    with running_engine(*random_pair, page_size=16) as engine:
        check(engine, random_reference, random_prompts(4, 5, 60), 60, "many")
    block = random_reference.block_size
    expected = {min(width, block) for width in TURNS}
    for i in range(4):
        assert set(widths_of(f"many-{i}")) == expected


def test_drafting_resumes_after_a_long_time_at_width_1(random_pair, random_reference):
    """The context that plain steps leave behind is what the drafter needs."""
    turns = [1] * 37 + [4] * 5
    with running_engine(*random_pair, widths=turns) as engine:
        check(engine, random_reference, random_prompts(3, 5, 60), 100, "resume")
    assert {1, 4} == set(widths_of("resume-0"))


def test_draft_window_after_plain_steps(random_pair, random_reference):
    with running_engine(
        *random_pair, widths=[1, 1, 1, 4], speculative_draft_window_size=32
    ) as engine:
        check(engine, random_reference, random_prompts(3, 5, 90), 50, "window-widths", window=32)


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


def test_a_joining_request_does_not_disturb_the_others(demo_pair):
    """Batches grow and shrink while widths change, and a request is aborted in between."""
    tokenizer = AutoTokenizer.from_pretrained(demo_pair[0])
    prompts = chat_prompts(tokenizer, 4)

    async def staggered(engine):
        async def late(ids, delay):
            await asyncio.sleep(delay)
            return await engine.async_generate(input_ids=ids, sampling_params=GREEDY)

        async def doomed():
            stream = await engine.async_generate(
                input_ids=prompts[0],
                sampling_params=GREEDY | {"max_new_tokens": 2000},
                rid="doomed-widths",
                stream=True,
            )
            async for chunk in stream:
                if chunk["meta_info"]["completion_tokens"] >= 12:
                    engine.tokenizer_manager.abort_request("doomed-widths")

        tasks = (late(ids, 0.3 * i) for i, ids in enumerate(prompts))
        answers = await asyncio.gather(*tasks, doomed())
        return [answer["output_ids"] for answer in answers[:-1]]

    with running_engine(demo_pair[0]) as engine:
        alone = [
            engine.generate(input_ids=ids, sampling_params=GREEDY)["output_ids"] for ids in prompts
        ]
    for widths in (TURNS, "on"):
        with running_engine(*demo_pair, widths=widths) as engine:
            assert engine.loop.run_until_complete(staggered(engine)) == alone, widths
