"""Grammar, logprobs, stops, streaming, n, ignore_eos: the same with and without DFLARE.

What is asked, all of it in one batch, is in `demo_answers`.
"""

import json
from itertools import pairwise

import pytest
from demo_answers import tokens

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        *("json", "regex", "stop", "stop_token", "ignore_eos", "bias"),
        *("frequency", "presence", "repetition", "all_penalties", "min_new_tokens"),
    ],
)
def test_same_tokens_and_finish_reason(alone, dflare, name):
    alone, dflare = alone[name], dflare[name]
    assert dflare["output_ids"] == alone["output_ids"]
    assert dflare["text"] == alone["text"]
    assert dflare["meta_info"]["finish_reason"] == alone["meta_info"]["finish_reason"]


def test_json_follows_the_schema(dflare):
    person = json.loads(dflare["json"]["text"])
    assert set(person) == {"name", "age", "city"} and person["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("name", ["plain", "count", "person"])
def test_penalised_requests_beside_free_ones(alone, dflare, name):
    free, penalised = f"free {name}", f"penalised {name}"
    for kind in (free, penalised):
        assert dflare[kind]["output_ids"] == alone[kind]["output_ids"]
    assert alone[free]["output_ids"] != alone[penalised]["output_ids"], "penalties change nothing"


def test_logprobs(alone, dflare):
    metas = [result["logprobs"]["meta_info"] for result in (alone, dflare)]
    for key in ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
        flat = [_flatten(meta[key]) for meta in metas]
        assert [token for _, token in flat[0]] == [token for _, token in flat[1]]
        assert [v for v, _ in flat[0]] == pytest.approx([v for v, _ in flat[1]], abs=2e-4)


def _flatten(entries) -> list[tuple[float, int]]:
    if entries and isinstance(entries[0], (list, tuple)) and isinstance(entries[0][0], float):
        return [(entry[0], entry[1]) for entry in entries]
    return [pair for entry in entries for pair in _flatten(entry)]


def test_n_gives_n_equal_greedy_answers(alone, dflare):
    first, second = tokens(dflare["n"])
    assert first == second and [first, second] == tokens(alone["n"])


def test_streaming_grows_to_the_same_text(alone, dflare):
    chunks = dflare["stream"]
    assert chunks[-1] == alone["stream"][-1]
    assert all(later.startswith(earlier) for earlier, later in pairwise(chunks))
