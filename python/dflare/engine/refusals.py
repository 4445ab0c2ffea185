"""Requests that SGLang 0.5.23 refuses with status 500 though the client is wrong: here with 400.

Its Ollama endpoints, `/parse_function_call`, `/separate_reasoning` and `/v1/loads` let the
ValueError of a wrong request pass, and a stream of Ollama's breaks off after status 200;
`/v1/detokenize` fails on what is no 32-bit number, `/vertex_generate` on parameters of no request.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from dflare.engine.request_guard import is_active


@contextmanager
def _refused(kind: type[Exception] = ValueError, reason: str = "") -> Iterator[None]:
    """Make an exception of this kind the client's fault."""
    from fastapi import HTTPException

    try:
        yield
    except kind as error:
        if not is_active():
            raise
        raise HTTPException(400, f"{reason}{error}") from error


def _refuse(original, *args, **kwargs):
    with _refused():
        return original(*args, **kwargs)


async def _ollama(original, *args, **kwargs):
    from fastapi.responses import StreamingResponse

    with _refused():
        answer = await original(*args, **kwargs)
        if isinstance(answer, StreamingResponse) and is_active():
            first = await anext(aiter(answer.body_iterator))
            answer.body_iterator = _chain(first, answer.body_iterator)
        return answer


async def _detokenize(original, handler, adapted, request, raw_request):
    each = (x for item in request.tokens for x in (item if isinstance(item, list) else [item]))
    wrong = [token for token in each if isinstance(token, int) and not 0 <= token < 1 << 32]
    if wrong and is_active():
        return handler.create_error_response(
            f"tokens must be ids of the vocabulary, got {wrong[0]}"
        )
    return await original(handler, adapted, request, raw_request)


def _built(original, self, *args, **kwargs) -> None:
    """`/vertex_generate` makes a client's `parameters` a request's fields, whatever they are."""
    with _refused(TypeError, "the request cannot be served as written: "):
        original(self, *args, **kwargs)


async def _chain(first: Any, rest: Any) -> AsyncIterator[Any]:
    yield first
    async for part in rest:
        yield part


# (SGLang's function below sglang.srt, the hook around it, the function's parameters)
REFUSALS = (
    (
        "function_call.function_call_parser.FunctionCallParser.__init__",
        _refuse,
        "self tools tool_call_parser tokenizer tool_choice prefix constrained",
    ),
    (
        "parser.reasoning_parser.ReasoningParser.__init__",
        _refuse,
        "self model_type stream_reasoning force_reasoning request tokenizer "
        "tool_call_parser_active prefix",
    ),
    ("managers.load_snapshot.LoadSnapshot.to_dict", _refuse, "self include"),
    ("managers.io_struct.GenerateReqInput.__init__", _built, "self text input_ids ..."),
    (
        "entrypoints.openai.serving_tokenize.OpenAIServingDetokenize._handle_non_streaming_request",
        _detokenize,
        "self adapted_request request raw_request",
    ),
    ("entrypoints.ollama.serving.OllamaServing.handle_chat", _ollama, "self request raw_request"),
    (
        "entrypoints.ollama.serving.OllamaServing.handle_generate",
        _ollama,
        "self request raw_request",
    ),
)
