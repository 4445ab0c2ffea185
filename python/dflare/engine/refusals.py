"""Requests that SGLang 0.5.23 refuses with status 500 though the client is wrong: here with 400.

Its Ollama endpoints, `/parse_function_call` and `/separate_reasoning` let the ValueError of a wrong
request pass; a stream of Ollama's breaks off after status 200.
"""

from collections.abc import AsyncIterator
from typing import Any

from dflare.engine.request_guard import is_active


def _parser(original, *args, **kwargs):
    from fastapi import HTTPException

    try:
        return original(*args, **kwargs)
    except ValueError as error:
        if not is_active():
            raise
        raise HTTPException(400, str(error)) from error


async def _ollama(original, *args, **kwargs):
    from fastapi import HTTPException
    from fastapi.responses import StreamingResponse

    try:
        answer = await original(*args, **kwargs)
        if isinstance(answer, StreamingResponse) and is_active():
            first = await anext(aiter(answer.body_iterator))
            answer.body_iterator = _chain(first, answer.body_iterator)
        return answer
    except ValueError as error:
        if not is_active():
            raise
        raise HTTPException(400, str(error)) from error


async def _chain(first: Any, rest: Any) -> AsyncIterator[Any]:
    yield first
    async for part in rest:
        yield part


# (SGLang's function below sglang.srt, the hook around it, the function's parameters)
REFUSALS = (
    (
        "function_call.function_call_parser.FunctionCallParser.__init__",
        _parser,
        "self tools tool_call_parser tokenizer tool_choice prefix constrained",
    ),
    (
        "parser.reasoning_parser.ReasoningParser.__init__",
        _parser,
        "self model_type stream_reasoning force_reasoning request tokenizer "
        "tool_call_parser_active prefix",
    ),
    ("entrypoints.ollama.serving.OllamaServing.handle_chat", _ollama, "self request raw_request"),
    (
        "entrypoints.ollama.serving.OllamaServing.handle_generate",
        _ollama,
        "self request raw_request",
    ),
)
