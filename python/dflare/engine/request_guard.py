"""What a request may ask for, checked before it reaches the scheduler.

SGLang 0.5.23 trusts a request in places: a token id beyond the embedding, a count of log
probabilities beyond the vocabulary or a parameter of a wrong type raise in the scheduler's process,
which ends the server for everybody. Every way in (HTTP, `sglang.Engine`, gRPC) passes two methods:
`GenerateReqInput.normalize_batch_and_arguments`, then, once a request is tokenized,
`TokenizerManager._create_tokenized_object`. The hooks below stand there. They raise `ValueError`,
which SGLang turns into status 400; what SGLang itself refuses is left to SGLang.
"""

import copy
import re
import re._parser as parser  # as SGLang does to bound the length of a match
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

# As OpenAI's API: each sample is a request of its own in the queue.
MAX_SAMPLES = 128
# Log probabilities that one request may ask for, over all its tokens: a Python tuple each, so this
# is about 150 MB in the server's first process.
MAX_LOGPROBS = 1 << 20
# Logits with a bias beyond this overflow float32 once a small temperature divides them.
_MAX_BIAS = 1e30
# SGLang's own value for "all tokens"; it keeps top_k in 32 bits.
_MOST_TOP_K = 1 << 30
_REPEATS = (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT)
# Repetitions of a stop_regex that may vary by more than so many; each multiplies the time of a
# search by the length of the text.
_LONG_REPEAT, _MOST_LONG_REPEATS = 16, 2
# What SGLang's own parsing raises about a request instead of a ValueError.
_FOREIGN = (
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    re.error,
    msgspec.MsgspecError,
)


@dataclass(frozen=True)
class Limits:
    """What the served model sets: its vocabulary and context, in tokens."""

    vocab_size: int
    context_length: int


def check_shape(request: Any) -> None:
    """Refuse a request whose fan-out would cost memory before anything else looks at it.

    Args:
        request: a `GenerateReqInput` as the client wrote it.

    Raises:
        ValueError: given, expected.
    """
    given = request.sampling_params
    each = given if isinstance(given, list) else [given or {}]
    if not each or not all(isinstance(params, dict) for params in each):
        raise ValueError(
            "sampling_params must be an object, or a list of one object per prompt; "
            f"got {_short(given)}"
        )
    for params in each:
        samples = params.get("n", 1)
        if samples is not None and not (_is_int(samples) and 1 <= samples <= MAX_SAMPLES):
            raise ValueError(f"n must be 1 to {MAX_SAMPLES} samples, got {_short(samples)}")


def _check_one_each(request: Any) -> None:
    given = request.sampling_params
    if request.is_single and isinstance(given, list):
        raise ValueError("sampling_params is a list, but there is one prompt: give one object")
    if not request.is_single and len(given) != request.batch_size * request.parallel_sample_num:
        raise ValueError(
            f"{len(given)} sampling_params for {request.batch_size} prompts; give one for each, or "
            "one object for all"
        )
    if request.is_single and not isinstance(request.rid, str):
        raise ValueError(f"rid must be a string for one prompt, got {_short(request.rid)}")


def check_request(request: Any, given: dict[str, Any], limits: Limits) -> None:
    """Refuse a tokenized request that the model's limits do not allow.

    Args:
        request: a `TokenizedGenerateReqInput` with normalised sampling parameters.
        given: the sampling parameters as the client wrote them; normalising hides a wrong top_k.
        limits: the served model's.

    Raises:
        ValueError: given, expected.
    """
    _check_types(request)
    _check_prompt(request, limits)
    _check_logprobs(request, limits)
    params, vocabulary = request.sampling_params, limits.vocab_size
    top_k = given.get("top_k")
    if top_k is not None and not -1 <= top_k <= _MOST_TOP_K:
        raise ValueError(
            f"top_k must be -1 (all tokens) or in [1, {_MOST_TOP_K}], got {_short(top_k)}"
        )
    if params.min_new_tokens > limits.context_length:
        raise ValueError(
            f"min_new_tokens must be at most the context of {limits.context_length} tokens, got "
            f"{_short(params.min_new_tokens)}"
        )
    for token in params.stop_token_ids or ():
        if not 0 <= token < vocabulary:
            raise ValueError(f"stop_token_ids must be in [0, {vocabulary - 1}], got {token}")
    for pattern in params.stop_regex_strs or ():
        _check_stop_regex(pattern)
    for token, bias in (params.logit_bias or {}).items():
        if not abs(bias) <= _MAX_BIAS:
            raise ValueError(
                f"logit_bias must be in [-{_MAX_BIAS:g}, {_MAX_BIAS:g}], got {bias} for {token}"
            )
    if params.stream_interval is not None and params.stream_interval < 1:
        raise ValueError(f"stream_interval must be at least 1 token, got {params.stream_interval}")


def _check_types(request: Any) -> None:
    """Read the request back as the scheduler will: a wrong type would raise there."""
    from sglang.srt.managers import io_struct

    # Any value passes SGLang's schema here; only its own code makes such an object.
    overrides = request.positional_embed_overrides
    if overrides is not None and not isinstance(overrides, io_struct.PositionalEmbeds):
        raise ValueError("positional_embed_overrides cannot be given by a client")
    # Ids are an array of 64-bit integers already; what travels pickled is SGLang's own.
    small = copy.copy(request)
    small.input_ids = small.input_embeds = small.mm_inputs = small.time_stats = None
    small.positional_embed_overrides = None
    io_struct.msgpack_decode(io_struct.msgpack_encode(small))


def _check_prompt(request: Any, limits: Limits) -> None:
    ids = request.input_ids
    length = len(ids) if ids is not None else 0
    if not length and not (request.session_params or request.input_embeds or request.mm_inputs):
        raise ValueError("the prompt is empty; give at least one token")
    if length:
        values = np.frombuffer(ids, dtype=np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= limits.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {limits.vocab_size - 1}], got {low if low < 0 else high}"
            )
    for name in ("token_indices_to_pool", "multi_item_delimiter_indices"):
        positions = getattr(request, name) or ()
        if any(not 0 <= position < length for position in positions):
            raise ValueError(f"{name} must be positions in the prompt of {length} tokens")


def _check_stop_regex(pattern: str) -> None:
    """Refuse what can take exponential time: it is searched after every token, in the scheduler."""
    open_ended = 0

    def visit(items: Any, repeated: bool) -> None:
        nonlocal open_ended
        for kind, value in items:
            if kind in _REPEATS:
                least, most, inner = value
                if repeated and least != most:
                    raise ValueError(f"stop_regex {_short(pattern)}: a repetition inside another")
                open_ended += most - least > _LONG_REPEAT
                visit(inner, repeated or most > 1)
            elif kind is parser.BRANCH:
                if repeated:
                    raise ValueError(
                        f"stop_regex {_short(pattern)}: alternatives inside a repetition"
                    )
                for branch in value[1]:
                    visit(branch, repeated)
            elif kind in (parser.ASSERT, parser.ASSERT_NOT):
                visit(value[1], repeated)
            elif kind in (parser.SUBPATTERN, parser.ATOMIC_GROUP):
                visit(value[-1] if kind is parser.SUBPATTERN else value, repeated)

    visit(parser.parse(pattern), False)
    if open_ended > _MOST_LONG_REPEATS:
        raise ValueError(
            f"stop_regex {_short(pattern)}: {open_ended} open-ended repetitions, expected at most "
            f"{_MOST_LONG_REPEATS}"
        )


def _check_logprobs(request: Any, limits: Limits) -> None:
    start, top = request.logprob_start_len, request.top_logprobs_num
    if start < -1:
        raise ValueError(f"logprob_start_len must be -1 (output only) or a position, got {start}")
    if not 0 <= top <= limits.vocab_size:
        raise ValueError(
            f"the number of top log probabilities must be 0 to {limits.vocab_size}, got {top}"
        )
    if not request.return_logprob:
        return
    prompt = len(request.input_ids or ())
    wanted = request.sampling_params.max_new_tokens
    room = max(limits.context_length - prompt, 0)
    tokens = room if wanted is None else min(wanted, room)
    tokens += prompt - start if start >= 0 else 0
    each = top + len(request.token_ids_logprob or ())
    if tokens * each > MAX_LOGPROBS:
        raise ValueError(
            f"{each} log probabilities for each of {tokens} tokens are {tokens * each}, expected "
            f"at most {MAX_LOGPROBS}; ask for fewer, or for fewer tokens"
        )


def is_active() -> bool:
    """Whether this process serves with DFLARE or on a platform of this package."""
    from sglang.srt.runtime_context import get_spec

    from dflare.engine.names import ALGORITHM
    from dflare.engine.own_platform import own_platform

    if own_platform():
        return True
    return str(get_spec().speculative_algorithm).upper() == ALGORITHM


def _normalize(original, request) -> None:
    if not is_active():
        return original(request)
    with _as_value_error():
        check_shape(request)
        original(request)
        _check_one_each(request)


def _normalize_embedding(original, request):
    """Embeddings are refused later on, where a model gives none; first they are parsed."""
    if not is_active():
        return original(request)
    with _as_value_error():
        return original(request)


def _item(original, request, i):
    """The request of one prompt of several: SGLang does not look at the length of every list."""
    try:
        return original(request, i)
    except (LookupError, TypeError) as error:
        if not is_active():
            raise
        raise ValueError(
            f"a field of the request that is a list must have a value for each of its "
            f"{request.batch_size} prompts ({error})"
        ) from error


def _tokenized(original, manager, obj, *args, **kwargs):
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    if not is_active():
        return original(manager, obj, *args, **kwargs)
    with _as_value_error():
        request = original(manager, obj, *args, **kwargs)
        if isinstance(request, TokenizedGenerateReqInput):
            limits = Limits(manager.model_config.vocab_size, manager.context_len)
            check_request(request, obj.sampling_params, limits)
    return request


def _compile(original, backend, key, *args, **kwargs):
    """A grammar that allows no first token is refused like one that does not compile."""
    from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

    grammar = original(backend, key, *args, **kwargs)
    if isinstance(grammar, XGrammarGrammar) and is_active():
        mask = grammar.allocate_vocab_mask(grammar.vocab_size, 1, "cpu")
        grammar.fill_vocab_mask(mask, 0)
        if not mask.any():
            return InvalidGrammarObject(f"{key[0]}: no text matches it, not even its first token")
    return grammar


async def _start_profile(original, manager, req=None):
    from fastapi import HTTPException

    if req is not None and is_active():
        try:
            _check_profile(req)
        except (ValueError, OSError) as error:
            raise HTTPException(400, f"/start_profile: {error}") from error
    return await original(manager, req)


def _check_profile(req: Any) -> None:
    """The scheduler writes the trace when profiling stops, and would end if it cannot."""
    import os
    import tempfile
    from pathlib import Path

    folder = Path(req.output_dir or os.getenv("SGLANG_TORCH_PROFILER_DIR", "/tmp")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    for name in ("start_step", "num_steps"):
        value = getattr(req, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


@contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except _FOREIGN as error:
        raise ValueError(f"the request cannot be served as written: {error}") from error


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# (SGLang's function below sglang.srt, the hook around it, the function's parameters); the hooks act
# where DFLARE or this package's CPU platform serves. `dflare.engine.hooks` puts them in place.
GUARDS = (
    ("managers.io_struct.GenerateReqInput.normalize_batch_and_arguments", _normalize, "self"),
    ("managers.io_struct.GenerateReqInput.__getitem__", _item, "self i"),
    (
        "managers.io_struct.EmbeddingReqInput.normalize_batch_and_arguments",
        _normalize_embedding,
        "self",
    ),
    ("managers.io_struct.EmbeddingReqInput.__getitem__", _item, "self i"),
    (
        "managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        _tokenized,
        "self obj input_text input_ids input_embeds mm_inputs token_type_ids",
    ),
    (
        "constrained.base_grammar_backend.BaseGrammarBackend._init_value_dispatch",
        _compile,
        "self key require_reasoning",
    ),
    (
        "managers.tokenizer_control_mixin.TokenizerControlMixin.start_profile",
        _start_profile,
        "self req",
    ),
)
