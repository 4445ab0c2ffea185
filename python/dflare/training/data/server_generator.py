"""Generation by an SGLang server, over HTTP: the fastest way to much data on a GPU."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from dflare.errors import DFlareError
from dflare.training.data.generate import Answer, Sampling

_START_SECONDS = 1200.0  # the target may have to be downloaded
_REQUEST_SECONDS = 600.0


class ServerGenerator:
    """Answers prompts with a running server; the server batches them.

    Args:
        url: Of the server, such as ``http://127.0.0.1:30000``.
        rows: Requests in flight.
        max_length: Tokens of prompt and answer together; longer prompts are skipped.
        sampling: How tokens are drawn.
    """

    def __init__(self, url: str, rows: int, max_length: int, sampling: Sampling) -> None:
        self._url, self._rows = url.rstrip("/"), rows
        self._max_length, self._sampling = max_length, sampling
        self.generated = 0
        self.seconds = 0.0

    def _ask(self, index: int, prompt: list[int]) -> Answer:
        room = min(self._sampling.max_new_tokens, self._max_length - len(prompt))
        body = {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": self._sampling.temperature,
                "min_p": self._sampling.min_p,
                "max_new_tokens": room,
                "stop_token_ids": list(self._sampling.stop_ids),
            },
        }
        hint = "what it generated so far is kept, start the command again to go on"
        content = ask_server(self._url, body, hint)
        ids = [int(token) for token in content["output_ids"]]
        end = content["meta_info"]["finish_reason"].get("matched")
        if not isinstance(end, int):
            return Answer(index, ids, "length")
        return Answer(index, ids if ids[-1:] == [end] else [*ids, end], "stop")

    def run(self, prompts: Iterable[list[int]], deadline: float | None = None) -> Iterator[Answer]:
        """Answer prompts; as :meth:`dflare.training.data.generate.Generator.run`."""
        waiting = (
            (index, ids) for index, ids in enumerate(prompts) if 0 < len(ids) < self._max_length
        )
        started, before = time.monotonic(), self.seconds
        pool = ThreadPoolExecutor(self._rows)
        flying: set[Future[Answer]] = set()
        try:
            while True:
                for index, ids in islice(waiting, self._rows - len(flying)):
                    flying.add(pool.submit(self._ask, index, ids))
                if not flying or (deadline is not None and time.monotonic() > deadline):
                    return
                landed, flying = wait(flying, timeout=5.0, return_when=FIRST_COMPLETED)
                for future in landed:
                    answer = future.result()
                    self.generated += len(answer.ids)
                    self.seconds = before + time.monotonic() - started
                    if answer.ids:
                        yield answer
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def ask_server(url: str, body: dict[str, Any], hint: str) -> dict[str, Any]:
    """Send one request to a server's ``/generate``.

    Args:
        url: Of the server, without a slash at the end.
        body: Of the request.
        hint: What to do if it fails.

    Raises:
        DFlareError: No answer, or a refusal.
    """
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as response:
            return json.loads(response.read())
    except (urllib.error.URLError, OSError) as error:
        detail = error.read().decode()[:300] if isinstance(error, urllib.error.HTTPError) else ""
        raise DFlareError(
            f"the server at {url} did not answer: {error} {detail}; {hint}"
        ) from error


def server_info(url: str) -> dict[str, Any]:
    """Ask a server for its arguments; its ``dtype`` is ``auto`` where that is the model's.

    Raises:
        DFlareError: No SGLang server answers there.
    """
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/server_info", timeout=30) as response:
            info = json.loads(response.read())
            str(info["dtype"])
            return info
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DFlareError(
            f"no SGLang server answers at {url} ({error!r}); check the address, or start one"
        ) from error


@contextmanager
def own_server(target: str, arguments: list[str], log: Path) -> Iterator[str]:
    """Start an SGLang server for as long as it is needed; all of its processes end with it.

    Args:
        target: Folder or hub id.
        arguments: More command-line arguments for the server.
        log: File for what it prints.

    Returns:
        Its URL.

    Raises:
        DFlareError: It ends, or is not ready in time.
    """
    from dflare.apps.server_process import ServerProcess

    with ServerProcess(["--model-path", target, "--log-level", "warning", *arguments], log) as own:
        try:
            own.wait_until_healthy(seconds=_START_SECONDS)
        except DFlareError as error:
            raise DFlareError(f"{error}\nOr generate with --generator transformers") from error
        yield own.url
