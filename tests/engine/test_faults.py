"""Faults planted in a running engine, which survives them; docs/faults.md has all kinds."""

import asyncio

import psutil
import pytest
from engines import running_engine
from sglang.srt.managers.io_struct import GenerateReqInput

pytestmark = pytest.mark.slow

_PROMPT = list(range(10, 40))


@pytest.fixture(scope="module")
def engine(random_pair):
    with running_engine(*random_pair) as running:
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
