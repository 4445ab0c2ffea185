"""What SGLang lets pass as status 500, and what stays as it is."""

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from fastapi.responses import StreamingResponse

from dflare.engine import refusals


@pytest.fixture(autouse=True)
def serving_with_dflare(monkeypatch):
    monkeypatch.setattr(refusals, "is_active", lambda: True)


def raises(*_):
    raise ValueError("wrong")


def ollama(*parts):
    """What the hook makes of a stream of these parts, where an exception is raised."""

    async def body():
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part

    async def handle():
        return StreamingResponse(body())

    async def read():
        answer = await refusals._ollama(handle)
        return [part async for part in answer.body_iterator]

    return asyncio.run(read())


def test_a_parser_that_is_not_known_is_the_clients_fault():
    with pytest.raises(HTTPException) as refused:
        refusals._refuse(raises)
    assert (refused.value.status_code, refused.value.detail) == (400, "wrong")


def test_fields_of_no_request_are_the_clients_fault():
    def original(self, text=None):
        pass

    refusals._built(original, object(), text="x")
    with pytest.raises(HTTPException, match="unexpected keyword argument"):
        refusals._built(original, object(), no="x")


def test_a_stream_that_cannot_begin_is_refused_and_another_is_whole():
    assert ollama(b"1", b"2", b"3") == [b"1", b"2", b"3"]
    with pytest.raises(HTTPException, match="400: wrong"):
        ollama(ValueError("wrong"))


@pytest.mark.parametrize(
    ("tokens", "refused"), [([5, -1], True), ([[5], [2**32]], True), ([5, 6], False), ([[]], False)]
)
def test_tokens_that_are_no_ids_are_the_clients_fault(tokens, refused):
    async def original(*_):
        return "text"

    handler = SimpleNamespace(create_error_response=lambda message: message)
    request = SimpleNamespace(tokens=tokens)
    answer = asyncio.run(refusals._detokenize(original, handler, None, request, None))
    assert answer.startswith("tokens must be ids") == refused


def test_without_dflare_nothing_changes(monkeypatch):
    monkeypatch.setattr(refusals, "is_active", lambda: False)
    with pytest.raises(ValueError, match="wrong"):
        refusals._refuse(raises)
