"""Faults planted in a running engine, which survives them; docs/faults.md has all kinds.

A step that fails ends one request; it never changes an answer.
"""

import asyncio

import psutil
import pytest
from engines import engine_that_may_end
from fastapi import HTTPException
from sglang.srt.managers.io_struct import GenerateReqInput

pytestmark = pytest.mark.slow

_PROMPT = list(range(10, 40))
_PROMPTS = [[1, 2, 3, 4, 5], list(range(10, 60)), [7] * 9, [9, 8, 7]]


@pytest.fixture(scope="module")
def engine(random_pair):
    with engine_that_may_end(*random_pair) as running:
        yield running


def greedy(tokens: int) -> dict:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}


def child(name: str) -> psutil.Process:
    """The engine's process of that title."""
    children = psutil.Process().children(recursive=True)
    return next(c for c in children if any(name in part for part in c.cmdline()))


def test_a_stopped_process_goes_on_where_it_was(engine):
    """A machine that sleeps, a container that is frozen: time passes, answers do not change."""
    expected = engine.generate(input_ids=_PROMPT, sampling_params=greedy(60))["output_ids"]
    scheduler = child("sglang::scheduler")

    async def ask():
        request = GenerateReqInput(input_ids=_PROMPT, sampling_params=greedy(60), stream=True)
        answers = engine.tokenizer_manager.generate_request(request, None)
        await anext(answers)
        scheduler.suspend()
        await asyncio.sleep(3)
        scheduler.resume()
        return [answer["output_ids"] async for answer in answers][-1]

    assert engine.loop.run_until_complete(asyncio.wait_for(ask(), 120)) == expected


@pytest.mark.parametrize("offset", [86_400, -86_400])
def test_a_clock_that_jumps_changes_nothing(engine, offset):
    expected = engine.generate(input_ids=_PROMPT, sampling_params=greedy(40))["output_ids"]
    jump = greedy(40) | {"custom_params": {"clock_jumps_by": offset}}
    for params in (jump, greedy(40)):
        answer = engine.generate(input_ids=_PROMPT, sampling_params=params)
        assert answer["output_ids"] == expected
    assert abs(answer["meta_info"]["e2e_latency"]) < 120


def answers(engine, failures: list[str | None]) -> list:
    """Output ids of every prompt, sent at once; or what its request was answered with."""

    async def ask(ids, fail_in, number):
        params = greedy(24) | ({"custom_params": {"fail_in": fail_in}} if fail_in else {})
        request = GenerateReqInput(
            input_ids=ids, sampling_params=params, rid=f"request-{number}-{fail_in}"
        )
        answer = await anext(engine.tokenizer_manager.generate_request(request, None))
        return answer["output_ids"]

    async def ask_all():
        asked = (ask(*pair, i) for i, pair in enumerate(zip(_PROMPTS, failures, strict=True)))
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 120)

    return engine.loop.run_until_complete(ask_all())


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("place", [0, 2])
def test_only_the_request_that_fails_is_ended(engine, phase, place):
    failures: list[str | None] = [None] * len(_PROMPTS)
    expected = answers(engine, failures)
    failures[place] = phase
    got = answers(engine, failures)
    error = got.pop(place)
    assert isinstance(error, HTTPException) and error.status_code == 500
    assert f"ValueError: asked to fail in {phase}" in error.detail
    assert got == [ids for i, ids in enumerate(expected) if i != place]
    # Every slot came back: SGLang checks that whenever it is idle, and ends if one is missing.
    assert answers(engine, [None] * len(_PROMPTS)) == expected
