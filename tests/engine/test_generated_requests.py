"""No generated request ends the engine, hangs, or changes the answer of the next one.

`DFLARE_GENERATED` sets how many requests the long run sends.
"""

import asyncio
import os
from collections import Counter

import fastapi
import pytest
from engines import engine_that_may_end
from generated_requests import generate_requests
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.slow

_PROMPTS = [[1, 2, 3, 4, 5], list(range(10, 60))]
_GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
_ANSWER_SECONDS = 60
# An engine is a library: its caller may learn of a wrong request by any of these.
_REFUSALS = (ValueError, TypeError, fastapi.HTTPException)


def reference_answers(engine) -> list[list[int]]:
    answers = engine.generate(input_ids=_PROMPTS, sampling_params=_GREEDY)
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def engine(random_pair):
    with engine_that_may_end(*random_pair, widths="on", context_length=256) as running:
        running.expected = reference_answers(running)
        yield running


def send(engine, request: dict) -> str:
    """Every answer of one request, or how it was refused.

    Raises:
        TimeoutError: there was none in time.
        RuntimeError: the engine has ended.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    async def ask():
        answers = engine.tokenizer_manager.generate_request(GenerateReqInput(**request), None)
        return [answer async for answer in answers]

    try:
        engine.loop.run_until_complete(asyncio.wait_for(ask(), _ANSWER_SECONDS))
    except _REFUSALS as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return "answered"


def check(engine, counts: Counter, request: dict) -> None:
    outcome = send(engine, request)
    counts[outcome.partition(":")[0]] += 1
    assert reference_answers(engine) == engine.expected, request
    if counts.total() % 250 == 0:
        print(f"generated requests: {counts.total()}, {dict(counts)}", flush=True)


def run(engine, examples: int) -> Counter:
    counts: Counter = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )
    @given(generate_requests())
    def sent(request):
        check(engine, counts, request)

    sent()
    print(f"generated requests: {counts.total()}, {dict(counts)}")
    return counts


def test_a_few_hundred(engine):
    counts = run(engine, 200)
    assert counts["answered"] > 20 and counts["ValueError"] > 20, counts


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_thousands(engine):
    counts = run(engine, int(os.environ.get("DFLARE_GENERATED", "5000")))
    assert counts["answered"] > 500 and counts["ValueError"] > 500, counts
