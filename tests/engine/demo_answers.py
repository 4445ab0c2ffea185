"""What the demo target is asked by several tests: once alone, and once with DFLARE.

An engine that is started once answers everything, so that a test does not have to start its own.
"""

import asyncio
import json
from typing import Any

from prompts import chat, chat_prompts

FLAGS = {"grammar_backend": "xgrammar", "chunked_prefill_size": 512}
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer"},
            "city": {"enum": ["Paris", "Rome"]},
        },
        "required": ["name", "age", "city"],
    }
)
COPY = (
    "Repeat this text word for word: The kettle stood on the stove, the stove stood in the "
    "kitchen, and the kitchen stood in a small house at the end of the long road by the sea."
)
_REPEATING = (
    COPY,
    "Count from 1 to 30, separated by commas.",
    "Why is the sky blue?",
    COPY + " Go.",
)
_QUESTIONS = {
    "plain": "Name three colours and say why you like them.",
    "count": "Count from 1 to 20.",
    "person": "Invent a person: name, age and city, as JSON.",
}
_PENALTIES = {"frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.1}
_GREEDY = {"temperature": 0, "max_new_tokens": 40}
NEW_TOKENS, FEW_TOKENS = 64, 32


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


def cut(answers, length: int) -> list[list[int]]:
    """What the same requests give if they ask for so many tokens."""
    return [ids[:length] for ids in tokens(answers)]


def repeating(tokenizer) -> list[list[int]]:
    """Prompts whose answers repeat text, and one whose answer does not."""
    return [chat(tokenizer, question) for question in _REPEATING]


def copy(engine, tokenizer) -> list[dict]:
    """Answers that copy a text, which stands three times in the prompt, one after the other."""
    text = tokenizer.encode(COPY + "\n")
    prompts = [text * 3 + text[:cut] for cut in (5, 20, 35)]
    return generate(engine, prompts, concurrency=1, max_new_tokens=80, ignore_eos=True)


def coming_and_going(engine, prompts, rid: str) -> tuple[dict, list[dict]]:
    """One request is aborted while others join it; returns it and their answers."""
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS}

    async def doomed():
        endless = sampling | {"max_new_tokens": 3000, "ignore_eos": True}
        stream = await engine.async_generate(
            input_ids=prompts[0], sampling_params=endless, rid=rid, stream=True
        )
        async for chunk in stream:
            if chunk["meta_info"]["completion_tokens"] >= 20:
                engine.tokenizer_manager.abort_request(rid)
        return chunk

    async def late(ids, delay):
        await asyncio.sleep(delay)
        return await engine.async_generate(input_ids=ids, sampling_params=sampling)

    async def everybody():
        others = (late(ids, 0.3 * i) for i, ids in enumerate(prompts))
        aborted, *answers = await asyncio.gather(doomed(), *others)
        return aborted, answers

    return engine.loop.run_until_complete(everybody())


def ask_everything(engine, tokenizer) -> dict[str, Any]:
    """Answers by the name of what was asked."""
    chats = chat_prompts(tokenizer, 10)
    return {
        "chats": generate(engine, chats, concurrency=8, max_new_tokens=NEW_TOKENS),
        "repeating": generate(
            engine, repeating(tokenizer), concurrency=4, max_new_tokens=NEW_TOKENS
        ),
        "long": _long_prompts(engine, chats),
        **engine.loop.run_until_complete(_features(engine, tokenizer)),
    }


def _long_prompts(engine, chats) -> list[dict]:
    """1,200 tokens of prompt, in chunks, then three prompts that share most of them."""
    long = (chats[0] * 60)[:1200]
    prompts = [long, long[:900] + chats[1], long[:900] + chats[2], long]
    sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    return [engine.generate(input_ids=ids, sampling_params=sampling) for ids in prompts]


async def _features(engine, tokenizer) -> dict[str, Any]:
    """One request for each thing that can be asked for, all in one batch."""
    ids = {name: chat(tokenizer, question) for name, question in _QUESTIONS.items()}

    def one(name, sampling, **more):
        return engine.async_generate(
            input_ids=ids[name], sampling_params=_GREEDY | sampling, **more
        )

    async def stream():
        return [chunk["text"] async for chunk in await one("count", {}, stream=True)]

    later = {"min_new_tokens": 60, "max_new_tokens": 80, "stop_token_ids": [33]}
    asked = {
        "json": one("person", {"json_schema": SCHEMA, "max_new_tokens": 64}),
        "regex": one("plain", {"regex": "(red|blue), (green|grey)\\."}),
        "logprobs": one(
            "plain", {}, return_logprob=True, top_logprobs_num=3, token_ids_logprob=[5, 9]
        ),
        "stop": one("count", {"stop": ["7"]}),
        "stop_token": one("count", {"stop_token_ids": [33]}),
        "ignore_eos": one("plain", {"ignore_eos": True, "max_new_tokens": 90}),
        "n": one("count", {"n": 2}),
        "bias": one("plain", {"logit_bias": {"33": 4.0}}),
        "frequency": one("count", {"frequency_penalty": 0.7}),
        "presence": one("plain", {"presence_penalty": 1.1, "logit_bias": {"33": 4.0}}),
        "repetition": one("count", {"repetition_penalty": 1.3}),
        "all_penalties": one("person", _PENALTIES | {"json_schema": SCHEMA}),
        "min_new_tokens": one("count", later),
        "stream": stream(),
    }
    for name in ids:
        asked[f"free {name}"] = one(name, {})
        asked[f"penalised {name}"] = one(name, _PENALTIES | {"min_new_tokens": 30})
    return dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
