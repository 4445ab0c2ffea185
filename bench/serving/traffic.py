"""Requests of all kinds that a server meets, each with what must be true of its answer."""

import asyncio
import functools
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.serving.odd_requests import odd_request, wrong_requests
from bench.serving.reference import PATTERN, PATTERN_PARAMS, Reference, greedy_params

_LONG_ANSWER = 160  # tokens
_CROWD_EVERY = 5  # bursts


@dataclass
class Outcome:
    """What happened so far: requests by kind, and everything that was not the client's fault."""

    sent: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Traffic:
    """Sends random requests to one server."""

    def __init__(self, url: str, reference: Reference, seed: int, outcome: Outcome):
        """
        Args:
            url: Address of the server.
            reference: Known answers, with their prompts.
            seed: Of the order and of all sizes.
            outcome: Gains what is sent and what is wrong.
        """
        self._url = url
        self._reference = reference
        self._prompts = list(reference.greedy)
        self._random = random.Random(seed)
        self.outcome = outcome
        self._kinds: dict[str, tuple[float, Callable[[], Awaitable[None]]]] = {
            "greedy": (5, self._greedy),
            "long answer": (0.5, self._long_answer),
            "sampled": (3, self._sampled),
            "long prompt": (2, self._long_prompt),
            "grammar": (2, self._grammar),
            "logprobs": (1, self._logprobs),
            "cut off": (3, self._cut_off),
            "bad": (2, self._bad),
            "odd": (2, self._odd),
        }

    async def send(self, session: aiohttp.ClientSession, name: str | None = None) -> None:
        """Send one request and judge the answer.

        Args:
            session: For the connection.
            name: Its kind; a random one if there is none.
        """
        if name is None:
            names = list(self._kinds)
            name = self._random.choices(names, [self._kinds[n][0] for n in names])[0]
        await self._judge(session, name, self._kinds[name][1])

    async def send_all(self, session: aiohttp.ClientSession) -> None:
        """Send every kind of request once, one after the other, and every wrong one.

        What a server keeps from the first request of a kind on (a tokenizer's buffers, say) is
        no leak, and a short load may meet that kind late.
        """
        for name, (_, request) in self._kinds.items():
            await self._judge(session, name, request)
        for path, body in wrong_requests(self._any_prompt()):
            await self._judge(session, "bad", functools.partial(self._refused, path, body))

    async def _judge(
        self,
        session: aiohttp.ClientSession,
        name: str,
        request: Callable[[], Awaitable[None]],
    ) -> None:
        self._session = session
        self.outcome.sent[name] += 1
        try:
            await request()
        except (aiohttp.ClientError, TimeoutError, AssertionError, KeyError, ValueError) as error:
            self.outcome.faults.append(f"{name}: {type(error).__name__}: {error}"[:500])

    async def _generate(self, **body: Any) -> dict[str, Any]:
        async with self._session.post(f"{self._url}/generate", json=body) as response:
            text = await response.text()
            assert response.status == 200, f"status {response.status}: {text[:200]}"
            return json.loads(text)

    async def _greedy(self) -> None:
        await self._known(self._reference.greedy)

    async def _known(self, answers: dict[str, list[int]], **more: Any) -> dict[str, Any]:
        """Ask for the beginning of a known answer, and compare."""
        text, expected = self._random.choice(list(answers.items()))
        length = self._random.randint(1, len(expected))
        params = greedy_params(length)
        answer = await self._generate(text=text, sampling_params=params, **more)
        _compare(text, answer["output_ids"], expected[:length])
        return answer

    async def _long_answer(self) -> None:
        """Many of these at once do not fit into the KV pool; only the beginning is known."""
        text, expected = self._random.choice(list(self._reference.greedy.items()))
        params = greedy_params(_LONG_ANSWER)
        answer = await self._generate(text=text, sampling_params=params)
        assert len(answer["output_ids"]) == _LONG_ANSWER
        _compare(text, answer["output_ids"][: len(expected)], expected)

    async def _sampled(self) -> None:
        params = {
            "temperature": self._random.uniform(0.3, 1.5),
            "top_p": self._random.uniform(0.5, 1.0),
            "top_k": self._random.choice([-1, 1, 20]),
            "max_new_tokens": self._random.randint(1, 64),
            "ignore_eos": True,
        }
        answer = await self._generate(text=self._any_prompt(), sampling_params=params)
        assert len(answer["output_ids"]) == params["max_new_tokens"]

    async def _long_prompt(self) -> None:
        await self._known(self._reference.long)

    async def _grammar(self) -> None:
        text, expected = self._random.choice(list(self._reference.pattern.items()))
        greedy = self._random.random() < 0.5
        params = PATTERN_PARAMS | ({} if greedy else {"temperature": 0.8})
        answer = await self._generate(text=text, sampling_params=params)
        assert re.fullmatch(PATTERN, answer["text"]), f"{answer['text']!r} is not {PATTERN}"
        if greedy:
            _compare(text, answer["output_ids"], expected)

    async def _logprobs(self) -> None:
        answer = await self._known(self._reference.greedy, return_logprob=True)
        logprobs = answer["meta_info"]["output_token_logprobs"]
        assert [token for _, token, *_ in logprobs] == answer["output_ids"]
        assert all(value <= 1e-6 for value, *_ in logprobs)

    async def _cut_off(self) -> None:
        """A client that leaves in the middle, or asks for an abort."""
        rid = f"cut-{self._random.getrandbits(64):x}"
        text, expected = self._random.choice(list(self._reference.greedy.items()))
        params = greedy_params(200)
        body = {"rid": rid, "text": text, "stream": True, "sampling_params": params}
        chunks = self._random.randint(0, 6)
        async with self._session.post(f"{self._url}/generate", json=body) as response:
            assert response.status == 200, f"status {response.status}"
            async for line in response.content:
                if line.startswith(b"data: {"):
                    ids = json.loads(line.removeprefix(b"data: "))["output_ids"]
                    length = min(len(ids), len(expected))
                    _compare(text, ids[:length], expected[:length])
                    chunks -= 1
                if chunks < 0:
                    break
            if self._random.random() < 0.5:
                async with self._session.post(
                    f"{self._url}/abort_request", json={"rid": rid}
                ) as aborted:
                    assert aborted.status == 200, f"abort: status {aborted.status}"

    async def _bad(self) -> None:
        await self._refused(*self._random.choice(wrong_requests(self._any_prompt())))

    async def _refused(self, path: str, body: dict[str, Any]) -> None:
        async with self._session.post(f"{self._url}{path}", json=body) as response:
            refusal = (await response.text())[:200]
            assert 400 <= response.status < 500, (
                f"{json.dumps(body)[:120]}: status {response.status}, expected 4xx: {refusal}"
            )

    async def _odd(self) -> None:
        """Answered or refused; what follows shows that it left no trace."""
        body = odd_request(self._any_prompt(), self._random)
        async with self._session.post(f"{self._url}/generate", json=body) as response:
            text = (await response.text())[:200]
            assert response.status < 500, f"{json.dumps(body)}: status {response.status}: {text}"

    def _any_prompt(self) -> str:
        return self._random.choice(self._prompts)


def _compare(text: str, got: list[int], expected: list[int]) -> None:
    assert got == expected, f"{text[-60:]!r}: got {got}, expected {expected}"


async def run(
    traffic: Traffic, seconds: float, concurrency: int, seed: int, stop: Callable[[], bool]
) -> None:
    """Keep up to `concurrency` requests in flight, in bursts with quiet moments in between.

    The first burst, and every fifth, is a crowd of long answers, which must be retracted.

    Args:
        traffic: What to send.
        seconds: How long.
        concurrency: Most requests in flight.
        seed: Of the bursts.
        stop: Asked once a second; the load ends at once when it says so.
    """
    load = asyncio.create_task(_load(traffic, seconds, concurrency, seed))
    while not load.done():
        await asyncio.wait({load}, timeout=1.0)
        if stop():
            load.cancel()
            await asyncio.wait({load})
            return
    load.result()


async def _load(traffic: Traffic, seconds: float, concurrency: int, seed: int) -> None:
    rng = random.Random(seed)
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    async with _client() as session:
        for number in itertools.count():
            crowd = number % _CROWD_EVERY == 0
            kind = "long answer" if crowd else None
            burst = concurrency if crowd else rng.randint(1, 2 * concurrency)
            slots = asyncio.Semaphore(concurrency if crowd else rng.randint(1, concurrency))

            async def send(slots: asyncio.Semaphore = slots, kind: str | None = kind) -> None:
                async with slots:
                    if loop.time() < end:
                        await traffic.send(session, kind)

            await asyncio.gather(*(send() for _ in range(burst)))
            if loop.time() >= end:
                return
            await asyncio.sleep(rng.choice([0.0, 0.0, 0.5, 2.0]))


async def warm_up(traffic: Traffic) -> None:
    """Send every kind of request once, before memory is watched."""
    async with _client() as session:
        await traffic.send_all(session)


def _client() -> aiohttp.ClientSession:
    # A request that reuses an idle connection just as the server closes it fails by its own fault.
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=300),
        connector=aiohttp.TCPConnector(force_close=True),
    )
