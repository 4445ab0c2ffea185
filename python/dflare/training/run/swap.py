"""Put a drafter into a running server if it drafts better, and the old one back if it does not.

The server keeps what it serves (`DFLARE_TRAFFIC`, see `dflare.engine.traffic`). Both drafters draft
the answers that were held back; the new one is loaded only where it is surely better. Requests that
run wait meanwhile and go on. What is served afterwards then has the last word.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import requests
import torch

from dflare.engine.traffic import HELD_BACK, LEARNED
from dflare.errors import DFlareError
from dflare.training.data.files import read_records
from dflare.training.data.target import Target, load_target, target_path
from dflare.training.drafter.export import load_drafter
from dflare.training.run.draft_table import draft_table
from dflare.training.run.evaluate import compare

_JUDGED = 64  # conversations held back that both drafters draft, the latest
_MOST_TOKENS = 2048  # of a conversation
_WATCHED = 32  # conversations served after the swap, and before it, that are compared
_POLL_SECONDS = 2.0
_SECONDS = 120.0  # that a server may take for an answer


class Server:
    """A running SGLang server with DFLARE.

    Args:
        url: Such as ``http://127.0.0.1:30000``.
        api_key: Its ``--api-key``, if it has one.
        admin_api_key: The same of ``--admin-api-key``.
    """

    def __init__(
        self, url: str, api_key: str | None = None, admin_api_key: str | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._client_key, self._admin_key = api_key, admin_api_key or api_key

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return what it answers to a GET, or to a POST if there is a body.

        Raises:
            DFlareError: It cannot be reached or refuses, with its reason.
        """
        method, key = ("GET", self._client_key) if body is None else ("POST", self._admin_key)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            reply = requests.request(
                method, self._url + path, json=body, headers=headers, timeout=_SECONDS
            )
        except requests.RequestException as error:
            raise DFlareError(f"{self._url}{path}: no answer ({error})") from error
        if reply.status_code != 200:
            raise DFlareError(f"{self._url}{path}: {reply.status_code} {reply.text.strip()}")
        return reply.json()

    def pair(self) -> tuple[str, str]:
        """Paths of the target and of the drafter that it serves now."""
        state = self.ask("/server_info")["internal_states"][0]
        if state.get("speculative_algorithm") != "DFLARE":
            raise DFlareError(f"{self._url} does not serve with DFLARE")
        return state["model_path"], state["speculative_draft_model_path"]

    def load(self, draft: str) -> None:
        """Let it serve with another drafter; running requests go on where they were."""
        with self._paused():
            self.ask("/update_weights_from_disk", {"model_path": draft})

    @contextmanager
    def _paused(self) -> Iterator[None]:
        # Retracted requests are prefilled anew: their context is the new drafter's then.
        self.ask("/pause_generation", {"mode": "retract"})
        try:
            yield
        finally:
            self.ask("/continue_generation", {})


def swap(
    server: Server, draft: Path, traffic: Path, watch_minutes: float, device: str = "cpu"
) -> bool:
    """Swap the server's drafter for a better one.

    Args:
        server: Keeps its traffic.
        draft: Folder of the new drafter, which the server can read too.
        traffic: Its `DFLARE_TRAFFIC` folder.
        watch_minutes: How long to wait for enough to be served afterwards.
        device: Where both drafters are compared.

    Returns:
        Whether the new drafter stays.

    Raises:
        DFlareError: The new drafter is not surely better on what was held back, nothing was, or the
            server refuses it; the old one serves on.
    """
    target, old = server.pair()
    draft = draft.resolve()
    gain, (low, high) = _gain(target, str(draft), old, traffic, device)
    print(f"held back: accept length {gain:+.1%} ({low:+.1%} .. {high:+.1%}) against {old}")
    if low <= 0:
        raise DFlareError(
            f"{draft} is not surely better than {old} on what was held back; the server keeps that "
            "one. Train longer, or on more traffic"
        )
    before = _served(traffic)
    server.load(str(draft))
    print(f"the server drafts with {draft}")
    known = [row for rows in before.values() for row in rows][-_WATCHED:]
    after = _wait_for(traffic, before, watch_minutes) if known else []
    if not after:
        return True
    was, now = (sum(a for a, _ in rows) / sum(b for _, b in rows) for rows in (known, after))
    print(f"served: {was:.2f} tokens a step before, {now:.2f} in {len(after)} conversations after")
    if now >= was:
        return True
    server.load(old)
    print(f"the server drafts with {old} again")
    return False


def _gain(
    target: str, draft: str, old: str, traffic: Path, device: str
) -> tuple[float, tuple[float, float]]:
    answers = _held_back(traffic)
    model = load_target(target_path(target), (), torch.device(device), torch.float32)
    results = []
    for name in (draft, old):
        drafter = load_drafter(name).to(device)
        taps = Target(model.model, drafter.config.target_layer_ids)
        steps = [
            draft_table(taps, drafter, *pair).chain(drafter.config.block_size) for pair in answers
        ]
        results.append([[sum(tokens), len(tokens)] for tokens in steps])
    compared = compare(*results)
    return compared["gain"], compared["interval"]


def _held_back(traffic: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers held back, the latest."""
    pairs: list[tuple[list[int], list[int]]] = []
    for file in reversed(_files(traffic, HELD_BACK)):
        of_file = []
        for record in read_records(file):
            start, end = record.answers[-1]
            ids = [int(i) for i in record.ids[: min(end, _MOST_TOKENS)]]
            if len(ids) - start > 1:
                of_file.append((ids[:start], ids[start:]))
        pairs = of_file + pairs
        if len(pairs) >= _JUDGED:
            break
    if len(pairs) < 2:
        raise DFlareError(
            f"{traffic} has {len(pairs)} conversations held back, and two are needed to compare "
            "drafters; serve with DFLARE_TRAFFIC for longer"
        )
    return pairs[-_JUDGED:]


def _files(traffic: Path, kind: str) -> list[Path]:
    """Files in the order in which they were begun."""
    return sorted(traffic.glob(f"{kind}-*.xz"))


def _served(traffic: Path) -> dict[Path, list[tuple[int, int]]]:
    """Tokens and verify steps of the conversations of each file that were drafted."""
    return {file: _drafted(file, file.stat().st_size) for file in _files(traffic, LEARNED)}


@cache
def _drafted(file: Path, _size: int) -> list[tuple[int, int]]:
    """Those of one file; one that has not grown is read once."""
    return [
        (len(record.ids) - record.answers[-1][0], record.steps)
        for record in read_records(file)
        if record.steps
    ]


def _wait_for(
    traffic: Path, before: dict[Path, list[tuple[int, int]]], minutes: float
) -> list[tuple[int, int]]:
    """Return what was served since, as soon as it is enough or the time is over."""
    end = time.monotonic() + 60 * minutes
    while True:
        served = _served(traffic).items()
        after = [row for file, rows in served for row in rows[len(before.get(file, ())) :]]
        if len(after) >= _WATCHED or time.monotonic() >= end:
            return after
        time.sleep(_POLL_SECONDS)
