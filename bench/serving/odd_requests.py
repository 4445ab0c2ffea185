"""Requests that a careless or hostile client sends: some must be refused, all leave no trace."""

import math
import random
from typing import Any

_WRONG_PARAMS = (
    {"max_new_tokens": -1},
    {"temperature": -1.0},
    {"top_p": 7},
    {"top_k": -7},
    {"n": 1000},
    {"stop_token_ids": [10**9]},
    {"regex": "("},
    {"stop_regex": "((("},
    {"stop_regex": r"(.+)+\d{50}"},
    {"json_schema": '{"$ref": "#"}'},
    {"custom_params": {"a": {"b": {"c": 1}}}},
)
_WRONG_COMPLETIONS = ({"prompt": [5, -1]}, {"prompt": [10**9]}, {"prompt": ""}, {"logprobs": 10**5})
_WRONG_CHATS = (
    {"min_tokens": 3, "stop_token_ids": [10**9, -5]},
    {"logprobs": True, "top_logprobs": -1},
    {"n": 1000},
)
_PARAMS = (
    *("temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "stop_regex"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "regex"),
    *("json_schema", "ebnf", "structural_tag", "logit_bias", "sampling_seed", "custom_params"),
    *("ignore_eos", "skip_special_tokens", "stream_interval"),
)
_FIELDS = (
    *("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob", "stream"),
    *("return_hidden_states", "input_embeds", "image_data", "session_params", "lora_path"),
    *("positional_embed_overrides", "token_indices_to_pool", "priority", "rid", "sampling_params"),
)
_VALUES = (
    *(None, True, "", "(((", "\x00", "\ud800", [], {}, [[]], [None], [-1], {"a": {"b": []}}),
    *(0, 1, -1, 2.5, 1e300, math.nan, math.inf, 2**31, 2**63, -(2**63), 10**30),
)


def wrong_requests(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Path and body of requests that must be refused, with an error of the client's."""
    chat = {"model": "default", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
    completion = {"model": "default", "prompt": text, "max_tokens": 4}
    return [
        ("/generate", {"sampling_params": {"max_new_tokens": 4}}),
        ("/generate", {"text": "", "sampling_params": {"max_new_tokens": 4}}),
        ("/generate", {"text": "word " * 20_000, "sampling_params": {"max_new_tokens": 4}}),
        *(
            ("/generate", {"text": text, "sampling_params": {"max_new_tokens": 4} | params})
            for params in _WRONG_PARAMS
        ),
        *(("/v1/completions", completion | fields) for fields in _WRONG_COMPLETIONS),
        *(("/v1/chat/completions", chat | fields) for fields in _WRONG_CHATS),
    ]


def odd_request(text: str, rng: random.Random) -> dict[str, Any]:
    """A body for `/generate` with one or two odd values; it may be answered or refused."""
    params: dict[str, Any] = {"max_new_tokens": 4, "temperature": rng.choice([0, 1])}
    body: dict[str, Any] = {"text": text, "sampling_params": params}
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.6:
            params[rng.choice(_PARAMS)] = rng.choice(_VALUES)
        else:
            body[rng.choice(_FIELDS)] = rng.choice(_VALUES)
    return body
