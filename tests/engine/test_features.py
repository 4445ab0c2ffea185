"""Grammar, logprobs, stops, streaming, n, ignore_eos: the same with and without DFLARE."""

import asyncio
import json
from itertools import pairwise

import pytest
from engines import ALL_ARMS, running_engine
from prompts import chat
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

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
PENALTIES = {"frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.1}
GREEDY = {"temperature": 0, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def both(demo_pair):
    """Runs every request once on each engine: {name: answer} without and with DFLARE."""
    tokenizer = AutoTokenizer.from_pretrained(demo_pair[0])
    ask = {
        "plain": "Name three colours and say why you like them.",
        "count": "Count from 1 to 20.",
        "person": "Invent a person: name, age and city, as JSON.",
    }
    ids = {name: chat(tokenizer, question) for name, question in ask.items()}
    results = []
    for draft in (None, demo_pair[1]):
        with running_engine(demo_pair[0], draft, ALL_ARMS, grammar_backend="xgrammar") as engine:
            results.append(_all_requests(engine, ids))
    return results


def _all_requests(engine, ids) -> dict:
    def one(name, sampling, **more):
        return engine.generate(input_ids=ids[name], sampling_params=GREEDY | sampling, **more)

    async def stream():
        chunks = await engine.async_generate(
            input_ids=ids["count"], sampling_params=GREEDY, stream=True
        )
        return [chunk["text"] async for chunk in chunks]

    batch = asyncio.gather(
        engine.async_generate(
            input_ids=ids["person"], sampling_params=GREEDY | {"json_schema": SCHEMA}
        ),
        engine.async_generate(input_ids=ids["count"], sampling_params=GREEDY),
    )
    penalised = asyncio.gather(
        *(
            engine.async_generate(input_ids=ids[name], sampling_params=GREEDY | sampling)
            for name in ids
            for sampling in ({}, PENALTIES | {"min_new_tokens": 30}, {"repetition_penalty": 1.2})
        )
    )
    return {
        "json": one("person", {"json_schema": SCHEMA, "max_new_tokens": 64}),
        "json_in_batch": engine.loop.run_until_complete(_await(batch)),
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
        "all_penalties": one("person", PENALTIES | {"json_schema": SCHEMA}),
        "min_new_tokens": one(
            "count", {"min_new_tokens": 60, "max_new_tokens": 80, "stop_token_ids": [33]}
        ),
        "penalties_in_batch": engine.loop.run_until_complete(_await(penalised)),
        "stream": engine.loop.run_until_complete(stream()),
    }


async def _await(future):
    return await future


@pytest.mark.parametrize(
    "name",
    [
        *("json", "regex", "stop", "stop_token", "ignore_eos", "bias"),
        *("frequency", "presence", "repetition", "all_penalties", "min_new_tokens"),
    ],
)
def test_same_tokens_and_finish_reason(both, name):
    alone, dflare = (result[name] for result in both)
    assert dflare["output_ids"] == alone["output_ids"]
    assert dflare["text"] == alone["text"]
    assert dflare["meta_info"]["finish_reason"] == alone["meta_info"]["finish_reason"]


def test_json_follows_the_schema(both):
    person = json.loads(both[1]["json"]["text"])
    assert set(person) == {"name", "age", "city"} and person["city"] in ("Paris", "Rome")


def test_grammar_beside_a_free_request(both):
    alone, dflare = ([a["output_ids"] for a in result["json_in_batch"]] for result in both)
    assert dflare == alone


def test_penalised_requests_beside_free_ones(both):
    alone, dflare = ([a["output_ids"] for a in r["penalties_in_batch"]] for r in both)
    assert dflare == alone
    free, penalised, repetition = alone[:3]
    assert free != penalised and free != repetition, "the penalties changed nothing"


def test_logprobs(both):
    alone, dflare = (result["logprobs"]["meta_info"] for result in both)
    for key in ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
        flat = [_flatten(meta[key]) for meta in (alone, dflare)]
        assert [token for _, token in flat[0]] == [token for _, token in flat[1]]
        assert [v for v, _ in flat[0]] == pytest.approx([v for v, _ in flat[1]], abs=2e-4)


def _flatten(entries) -> list[tuple[float, int]]:
    if entries and isinstance(entries[0], (list, tuple)) and isinstance(entries[0][0], float):
        return [(entry[0], entry[1]) for entry in entries]
    return [pair for entry in entries for pair in _flatten(entry)]


def test_n_gives_n_equal_greedy_answers(both):
    alone, dflare = ([a["output_ids"] for a in result["n"]] for result in both)
    assert len(dflare) == 2 and dflare == alone


def test_streaming_grows_to_the_same_text(both):
    alone, dflare = (result["stream"] for result in both)
    assert dflare[-1] == alone[-1]
    assert all(later.startswith(earlier) for earlier, later in pairwise(dflare))
