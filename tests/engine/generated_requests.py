"""Strategies for requests that a careless or hostile client may send."""

import math
from typing import Any

from hypothesis import strategies as st

# Whatever a field is meant to hold, somebody sends one of these.
_ODD = [None, True, "", "x", [], {}, [[]], [None], {"a": {"b": []}}, "\x00", "\ud800"]
_NUMBERS = [0, -1, 1, 2.5, -0.0, 1e300, math.nan, math.inf, 2**31, 2**62, 2**63, -(2**63), 10**30]
_GRAMMARS = """\
(((
^$
[
(.+)+\\d{50}
((a{1,99}){1,99}){1,99}
a{1,100000}
(?<=a)b
{"$ref": "#"}
{"type": 3}
7
[]
{}
{"pattern": "((("}
{"anyOf": []}
{"enum": []}
{"type": "array", "minItems": 999999}
{"structures": [{}], "triggers": []}
root ::= root
root ::= "a" root"""
ODD: st.SearchStrategy[Any] = st.sampled_from([*_ODD, *_NUMBERS])
TOKEN = st.one_of(st.integers(0, 250), st.sampled_from([-1, 255, 256, 300, 49152, 2**31, 2**62]))
NUMBER = st.one_of(st.integers(-3, 40), st.floats(width=32), ODD)
TEXT = st.one_of(
    st.text(max_size=20), st.sampled_from(["", "a", "\x00", "<|mask|>", "ab " * 200, "\ud800"])
)
GRAMMAR = st.one_of(TEXT, st.sampled_from([*_GRAMMARS.splitlines(), '{"items": ' * 300]))
PARAMETERS = {
    "max_new_tokens": st.one_of(st.integers(0, 12), NUMBER),
    "min_new_tokens": NUMBER,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": NUMBER,
    "min_p": NUMBER,
    "frequency_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "repetition_penalty": NUMBER,
    "n": NUMBER,
    "beam_width": NUMBER,
    "stop": st.one_of(TEXT, st.lists(TEXT, max_size=40), ODD),
    "stop_token_ids": st.one_of(st.lists(TOKEN, max_size=5), ODD),
    "stop_regex": st.one_of(GRAMMAR, st.lists(GRAMMAR, max_size=3), ODD),
    "json_schema": st.one_of(GRAMMAR, ODD),
    "regex": st.one_of(GRAMMAR, ODD),
    "ebnf": st.one_of(GRAMMAR, ODD),
    "structural_tag": st.one_of(GRAMMAR, ODD),
    "ignore_eos": ODD,
    "skip_special_tokens": ODD,
    "no_stop_trim": ODD,
    "stream_interval": NUMBER,
    "logit_bias": st.one_of(
        st.dictionaries(st.sampled_from(["0", "5", "-1", "999", "x"]), NUMBER, max_size=3), ODD
    ),
    "sampling_seed": NUMBER,
    "custom_params": st.one_of(st.dictionaries(TEXT, ODD, max_size=2), ODD),
    "watermark": ODD,
}
FIELDS = {
    "rid": st.one_of(st.sampled_from(["", "a", "b" * 300]), ODD),
    "return_logprob": ODD,
    "logprob_start_len": NUMBER,
    "top_logprobs_num": NUMBER,
    "token_ids_logprob": st.one_of(st.lists(TOKEN, max_size=3), ODD),
    "return_text_in_logprobs": ODD,
    "return_hidden_states": ODD,
    "return_sampling_mask": ODD,
    "return_flat_raw_top_logprobs": ODD,
    "return_routed_experts": ODD,
    "routed_experts_start_len": NUMBER,
    "return_indexer_topk": ODD,
    "return_entropy": ODD,
    "return_prompt_token_ids": ODD,
    "stream": st.booleans(),
    "input_embeds": ODD,
    "image_data": ODD,
    "audio_data": ODD,
    "session_params": st.one_of(st.fixed_dictionaries({"id": TEXT}), ODD),
    "session_id": st.one_of(TEXT, ODD),
    "lora_path": ODD,
    "custom_logit_processor": ODD,
    "positional_embed_overrides": ODD,
    "bootstrap_room": ODD,
    "routed_dp_rank": NUMBER,
    "priority": NUMBER,
    "extra_key": st.one_of(TEXT, ODD),
    "cache_salt": st.one_of(TEXT, ODD),
    "kv_hints": ODD,
    "max_thinking_tokens": NUMBER,
    "multi_item_delimiter_indices": st.one_of(st.lists(NUMBER, max_size=3), ODD),
    "token_indices_to_pool": st.one_of(st.lists(NUMBER, max_size=3), ODD),
}
PROMPTS = st.one_of(
    st.fixed_dictionaries({"text": st.one_of(TEXT, st.lists(TEXT, max_size=3))}),
    st.fixed_dictionaries({"input_ids": st.lists(TOKEN, max_size=8)}),
    st.fixed_dictionaries({"input_ids": st.lists(st.lists(TOKEN, max_size=4), max_size=3)}),
)


# What can be served, so that odd values meet the rest of the server and not its checks alone.
SOUND = {
    "max_new_tokens": st.integers(0, 12),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(1, 50),
    "min_p": st.floats(0, 0.5),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "min_new_tokens": st.integers(0, 5),
    "n": st.integers(1, 3),
    "stop": st.lists(st.text("ab", min_size=1, max_size=2), max_size=2),
    "stop_token_ids": st.lists(st.integers(0, 250), max_size=3),
    "stop_regex": st.sampled_from(["a+b", "[0-9]{2}", "(x|y)z"]),
    "regex": st.sampled_from(["[a-z]{1,5}", "(yes|no)", ".*"]),
    "json_schema": st.sampled_from(['{"type": "object"}', '{"type": "integer"}']),
    "logit_bias": st.dictionaries(st.sampled_from(["0", "5", "99"]), st.floats(-100, 100)),
    "sampling_seed": st.integers(0, 2**31),
    "ignore_eos": st.booleans(),
}


@st.composite
def generate_requests(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a `GenerateReqInput`: a short request that can be served, with a few odd fields."""
    params: dict[str, Any] = {"max_new_tokens": 6, "temperature": draw(st.sampled_from([0.0, 1.0]))}
    for name in draw(st.lists(st.sampled_from(sorted(SOUND)), max_size=4, unique=True)):
        params[name] = draw(SOUND[name])
    for name in draw(st.lists(st.sampled_from(sorted(PARAMETERS)), max_size=2, unique=True)):
        params[name] = draw(PARAMETERS[name])
    request: dict[str, Any] = {"text": "ab", "sampling_params": params}
    kind = draw(st.integers(0, 9))
    if kind < 2:
        request = draw(PROMPTS) | {"sampling_params": params}
    elif kind == 2:
        request["sampling_params"] = draw(st.one_of(st.lists(st.just(params), max_size=3), ODD))
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=1, unique=True)):
        request[name] = draw(FIELDS[name])
    return request
