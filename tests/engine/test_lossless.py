"""Greedy output with DFLARE is token for token what the target alone gives in the same engine."""

import asyncio

import pytest
from engines import ALL_ARMS, running_engine
from prompts import chat_prompts
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow


def generate(engine, prompts, *, concurrency: int, **sampling) -> list[dict]:
    """Answers in the prompts' order, never more than `concurrency` in flight."""
    slots = asyncio.Semaphore(concurrency)

    async def one(ids):
        async with slots:
            return await engine.async_generate(
                input_ids=ids, sampling_params={"temperature": 0, **sampling}
            )

    async def everything():
        return await asyncio.gather(*(one(ids) for ids in prompts))

    return engine.loop.run_until_complete(everything())


def tokens(answers) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def questions(demo_pair):
    return chat_prompts(AutoTokenizer.from_pretrained(demo_pair[0]), 100)


def alone(demo_pair, questions) -> list[list[int]]:
    """What the demo target says without speculation, whatever is asked beside it."""
    with running_engine(demo_pair[0]) as engine:
        return tokens(generate(engine, questions, concurrency=8, max_new_tokens=64))


@pytest.fixture(scope="module")
def expected(demo_pair, questions):
    """Its answers to the first 20."""
    return alone(demo_pair, questions[:20])


def check_at_concurrency_1_and_8(demo_pair, questions, expected):
    with running_engine(*demo_pair, ALL_ARMS) as engine:
        for concurrency in (1, 8):
            answers = generate(engine, questions, concurrency=concurrency, max_new_tokens=64)
            assert tokens(answers) == expected
            engine.flush_cache()


def test_prompts_at_concurrency_1_and_8(demo_pair, questions, expected):
    check_at_concurrency_1_and_8(demo_pair, questions[:20], expected)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_hundred_prompts_at_concurrency_1_and_8(demo_pair, questions):
    check_at_concurrency_1_and_8(demo_pair, questions, alone(demo_pair, questions))


@pytest.mark.parametrize(
    "flags",
    [
        {"disable_radix_cache": True},
        {"page_size": 16},
        {"page_size": 64, "chunked_prefill_size": 64},
        {"chunked_prefill_size": 64, "enable_mixed_chunk": True},
        {"speculative_num_draft_tokens": 3},
    ],
    ids=str,
)
def test_configurations(demo_pair, questions, expected, flags):
    with running_engine(*demo_pair, ALL_ARMS, **flags) as engine:
        answers = generate(engine, questions[:12], concurrency=4, max_new_tokens=64)
        again = generate(engine, questions[:6], concurrency=4, max_new_tokens=64)
    assert tokens(answers) == expected[:12]
    assert tokens(again) == expected[:6]


def test_small_pool_retracts_and_loses_nothing(demo_pair, questions, expected):
    flags = {"max_total_tokens": 512, "schedule_conservativeness": 0.01}
    with running_engine(*demo_pair, ALL_ARMS, **flags) as engine:
        answers = generate(engine, questions[:12], concurrency=8, max_new_tokens=64)
    assert tokens(answers) == expected[:12]
    assert any(answer["meta_info"]["num_retractions"] for answer in answers)


def test_long_prompt_and_shared_prefixes(demo_pair, questions):
    """2,000 tokens of prompt, in chunks, then three prompts that share most of them."""
    long = (questions[0] * 60)[:2000]
    prompts = [long, long[:1500] + questions[1], long[:1500] + questions[2], long]
    outputs = []
    for draft in (None, demo_pair[1]):
        with running_engine(demo_pair[0], draft, ALL_ARMS, chunked_prefill_size=512) as engine:
            sampling = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
            answers = [engine.generate(input_ids=ids, sampling_params=sampling) for ids in prompts]
            outputs.append([answer["output_ids"] for answer in answers])
            cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
            assert cached[1] >= 1400 and cached[3] >= 1900, "the radix cache was not hit"
    assert outputs[0] == outputs[1]


def test_aborted_request_leaves_others_alone(demo_pair, questions, expected):
    async def scenario(engine):
        sampling = {"temperature": 0, "max_new_tokens": 64}

        async def doomed():
            endless = sampling | {"max_new_tokens": 3000, "ignore_eos": True}
            stream = await engine.async_generate(
                input_ids=questions[5], sampling_params=endless, rid="doomed", stream=True
            )
            async for chunk in stream:
                if chunk["meta_info"]["completion_tokens"] >= 20:
                    engine.tokenizer_manager.abort_request("doomed")
                last = chunk
            return last

        others = [
            engine.async_generate(input_ids=ids, sampling_params=sampling) for ids in questions[:3]
        ]
        aborted, *answers = await asyncio.gather(doomed(), *others)
        return (
            aborted,
            answers,
            await engine.async_generate(input_ids=questions[3], sampling_params=sampling),
        )

    with running_engine(*demo_pair, ALL_ARMS) as engine:
        aborted, answers, later = engine.loop.run_until_complete(scenario(engine))
        usage = engine.get_server_info()["internal_states"][0]
    assert aborted["meta_info"]["finish_reason"]["type"] == "abort"
    assert aborted["meta_info"]["completion_tokens"] < 3000
    assert tokens([*answers, later]) == expected[:4]
    assert usage is not None
