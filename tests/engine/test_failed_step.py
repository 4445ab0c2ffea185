"""A step that fails ends one request, or the engine with its reason; it never changes an answer."""

import asyncio

import pytest
from engines import engine_that_may_end
from fastapi import HTTPException
from sglang.srt.managers.io_struct import GenerateReqInput

pytestmark = pytest.mark.slow

_PROMPTS = [[1, 2, 3, 4, 5], list(range(10, 60)), [7] * 9, [9, 8, 7]]
_GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(random_pair):
    with engine_that_may_end(*random_pair) as running:
        running.expected = answers(running, [None] * len(_PROMPTS))
        yield running


def answers(engine, failures: list[str | None]) -> list:
    """Output ids of every prompt, sent at once; or what its request was answered with."""

    async def ask(ids, fail_in, number):
        params = _GREEDY | ({"custom_params": {"fail_in": fail_in}} if fail_in else {})
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
    failures = [None] * len(_PROMPTS)
    failures[place] = phase
    got = answers(engine, failures)
    error = got.pop(place)
    assert isinstance(error, HTTPException) and error.status_code == 500
    assert f"ValueError: asked to fail in {phase}" in error.detail
    assert got == [ids for i, ids in enumerate(engine.expected) if i != place]
    # Every slot came back: SGLang checks that whenever it is idle, and ends if one is missing.
    assert answers(engine, [None] * len(_PROMPTS)) == engine.expected
