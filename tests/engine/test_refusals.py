"""What SGLang lets pass as status 500, and what stays as it is."""

import asyncio

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
        refusals._parser(raises)
    assert (refused.value.status_code, refused.value.detail) == (400, "wrong")


def test_a_stream_that_cannot_begin_is_refused_and_another_is_whole():
    assert ollama(b"1", b"2", b"3") == [b"1", b"2", b"3"]
    with pytest.raises(HTTPException, match="400: wrong"):
        ollama(ValueError("wrong"))


def test_without_dflare_nothing_changes(monkeypatch):
    monkeypatch.setattr(refusals, "is_active", lambda: False)
    with pytest.raises(ValueError, match="wrong"):
        refusals._parser(raises)
