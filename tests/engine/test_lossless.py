"""Greedy output with DFLARE is token for token what the target alone gives in the same engine."""

import pytest
from demo_answers import NEW_TOKENS, cut, generate, repeating, tokens
from engines import ALL_ARMS, running_engine
from prompts import chat_prompts

pytestmark = pytest.mark.slow


def test_prompts_one_by_one_and_eight_at_once(alone, dflare):
    assert tokens(dflare["chats"]) == tokens(alone["chats"])
    assert tokens(dflare["one by one"]) == tokens(alone["chats"])[:4]


def test_text_that_repeats(alone, dflare):
    assert tokens(dflare["repeating"]) == tokens(alone["repeating"])
    accepted = sum(a["meta_info"]["spec_num_correct_drafts"] for a in dflare["repeating"])
    assert accepted > 40, "too little was accepted to prove anything"


def test_long_prompt_and_shared_prefixes(alone, dflare):
    assert tokens(dflare["long"]) == tokens(alone["long"])
    for answers in (alone["long"], dflare["long"]):
        cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
        assert cached[1] >= 850 and cached[3] >= 1150, "the radix cache was not hit"


def test_aborted_request_leaves_others_alone(alone, dflare):
    aborted, others = dflare["aborted"]
    assert aborted["meta_info"]["finish_reason"]["type"] == "abort"
    assert 20 <= aborted["meta_info"]["completion_tokens"] < 3000
    assert tokens(others) == tokens(alone["chats"])[:4]


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_hundred_prompts_at_concurrency_1_and_8(demo_pair, demo_tokenizer):
    questions = chat_prompts(demo_tokenizer, 100)
    with running_engine(demo_pair[0]) as engine:
        expected = tokens(generate(engine, questions, concurrency=8, max_new_tokens=NEW_TOKENS))
    with running_engine(*demo_pair, ALL_ARMS) as engine:
        for concurrency in (1, 8):
            answers = generate(
                engine, questions, concurrency=concurrency, max_new_tokens=NEW_TOKENS
            )
            assert tokens(answers) == expected
            engine.flush_cache()


@pytest.mark.parametrize(
    "flags",
    [
        {"page_size": 16, "chunked_prefill_size": 64, "enable_mixed_chunk": True},
        {"disable_radix_cache": True, "speculative_num_draft_tokens": 3},
        pytest.param({"page_size": 64, "chunked_prefill_size": 64}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_configurations(demo_pair, demo_tokenizer, alone, flags):
    prompts = repeating(demo_tokenizer) + chat_prompts(demo_tokenizer, 4)
    expected = alone["repeating"] + alone["chats"][:4]
    with running_engine(*demo_pair, ALL_ARMS, **flags) as engine:
        answers = generate(engine, prompts, concurrency=4, max_new_tokens=40)
        again = generate(engine, prompts[:6], concurrency=4, max_new_tokens=24)
    assert tokens(answers) == cut(expected, 40)
    assert tokens(again) == cut(expected[:6], 24)


def test_bfloat16(demo_pair, demo_tokenizer):
    """Where a near tie falls as in plain decoding only if every sum is taken in the same order."""
    prompts = repeating(demo_tokenizer) + chat_prompts(demo_tokenizer, 12)
    with running_engine(demo_pair[0], dtype="bfloat16") as engine:
        expected = tokens(generate(engine, prompts, concurrency=8, max_new_tokens=NEW_TOKENS))
    with running_engine(*demo_pair, ALL_ARMS, dtype="bfloat16") as engine:
        answers = generate(engine, prompts, concurrency=4, max_new_tokens=NEW_TOKENS)
    assert tokens(answers) == expected


def test_small_pool_retracts_and_loses_nothing(demo_pair, demo_tokenizer, alone):
    flags = {"max_total_tokens": 320, "schedule_conservativeness": 0.01}
    prompts = chat_prompts(demo_tokenizer, 10)
    with running_engine(*demo_pair, ALL_ARMS, **flags) as engine:
        # Two whole answers do not fit: it is enough if two requests meet, however late they come.
        answers = generate(engine, prompts, concurrency=8, max_new_tokens=160)
    assert cut(answers, NEW_TOKENS) == tokens(alone["chats"])[:10]
    assert any(answer["meta_info"]["num_retractions"] for answer in answers)
