"""What tests see of the engine: proposals, widths, and where the host waited for the device."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from device import DEVICE
from scripted_arms import ScriptedPolicy, Turn, configuration

from dflare.adaptive import AdaptiveConfig, ArmPolicy
from dflare.engine import tree_proposal
from dflare.engine.verify_step import step_slots
from dflare.engine.worker import DFlareWorker

# Frames of these are not the cause of a wait.
_MACHINERY = ("/torch/", "/triton/", "/tests/cuda_", "/cuda_device")


class Proposals:
    """Keeps what the drafter proposed, as copies on the device; they are read after the run.

    Reading them at once would make the host wait, and hide what it should have waited for.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[list[str], torch.Tensor, torch.Tensor]] = []
        step, accept = DFlareWorker.forward_batch_generation, DFlareWorker._accept_block
        steps = self._steps

        def forward_batch_generation(worker, batch, *args, **kwargs):
            worker._traced = [req.rid for req in batch.reqs]
            return step(worker, batch, *args, **kwargs)

        def _accept_block(worker, *, candidates, prefix_lens, **kwargs):
            if worker._traced is not None:  # not a dummy step at the start
                steps.append((worker._traced, prefix_lens.clone(), candidates.clone()))
            return accept(worker, candidates=candidates, prefix_lens=prefix_lens, **kwargs)

        DFlareWorker._traced = None
        DFlareWorker.forward_batch_generation = forward_batch_generation
        DFlareWorker._accept_block = _accept_block

    def collect(self) -> dict[str, list[dict[str, Any]]]:
        """`prefix` (context length) and `block` of every step since the last call, by request."""
        found: dict[str, list[dict[str, Any]]] = {}
        for rids, prefixes, blocks in self._steps:
            for rid, prefix, block in zip(rids, prefixes.tolist(), blocks.tolist(), strict=True):
                found.setdefault(rid, []).append({"prefix": prefix, "block": block})
        self._steps.clear()
        return found


class StepLaunches:
    """What the host launches in each decode step: for the draft, up to the target, and the append.

    Attributes:
        steps: of each step `draft`, kernels and copies and graphs that the host launches; `nodes`,
            kernels and copies in those graphs; `append`, as `draft`.
    """

    def __init__(self, worker: Any) -> None:
        self.steps: list[dict[str, int]] = []
        step, target = worker.forward_batch_generation, worker.target_worker
        verify = target.forward_batch_generation
        append = worker._append_target_hidden_to_draft_kv_by_loc
        begun: dict[str, int] = {}

        def forward_batch_generation(batch, *args, **kwargs):
            prefill = batch.forward_mode.is_extend() or batch.is_extend_in_batch
            begun.clear()
            begun.update({} if prefill else DEVICE.stats())
            return step(batch, *args, **kwargs)

        def verified(*args, **kwargs):
            if begun:
                launched, nodes = _launched_since(begun)
                self.steps.append({"draft": launched, "nodes": nodes})
            return verify(*args, **kwargs)

        def appended(**kwargs):
            before = DEVICE.stats()
            append(**kwargs)
            if begun:
                self.steps[-1]["append"] = sum(_launched_since(before))

        worker.forward_batch_generation = forward_batch_generation
        target.forward_batch_generation = verified
        worker._append_target_hidden_to_draft_kv_by_loc = appended


def _launched_since(before: dict[str, int]) -> tuple[int, int]:
    """Launches of the host, and nodes of the graphs among them."""
    now = DEVICE.stats()
    made = {name: now[name] - before[name] for name in now}
    return made["tasks"] + made["graph_launches"], made["graph_nodes"]


class Script:
    """Lets decode steps be these in turn, unmeasured.

    Attributes:
        ran: width of each step that ran, and for how many requests.
    """

    def __init__(self, turns: list[Turn]) -> None:
        self.ran: list[tuple[int, int]] = []

        def make_policy(config: AdaptiveConfig, _measure: Any) -> ArmPolicy:
            self._policy = ScriptedPolicy(config, turns, lambda *step: self.ran.append(step))
            return self._policy

        DFlareWorker.configure = staticmethod(lambda block_size: configuration(turns, block_size))
        DFlareWorker.make_policy = staticmethod(make_policy)

    def take(self, turns: list[Turn]) -> None:
        self._policy.take(turns)


def draft_from_text() -> None:
    """Let trees be drafted from the request's own text, with a wrong token before each of its own.

    A random drafter is hardly ever right; and where all the first nodes are, a tree's path lies
    where a chain's would, and nothing is moved. Here its nodes are the second, the fourth, ...
    """
    drafter = tree_proposal.draft_marginals

    def draft_marginals(worker, batch, count):
        tokens, _ = drafter(worker, batch, count)  # its graphs run all the same
        slots = step_slots(worker.model_runner, batch, int(worker.block_size))
        found = worker.texts.look_up(batch, slots).found[:, : tokens.shape[1], None]
        rank = torch.arange(count, device=found.device)
        log_probs = torch.where(rank == 1, -0.05, -0.1) - 5.0 * (rank > 1)
        shifted = (
            found + (rank == 0) + 2 * (rank > 1) * rank
        ) % worker.draft_model.config.vocab_size
        return shifted, log_probs.float().expand(shifted.shape).contiguous()

    tree_proposal.draft_marginals = draft_marginals


@contextmanager
def host_waits(on: bool) -> Iterator[Counter[tuple[str, ...]]]:
    """Count the host's waits for the device: what waited, then the callers, innermost first."""
    waits: Counter[tuple[str, ...]] = Counter()

    def note(operation: str, _site: str) -> None:
        waits[(operation, *_callers())] += 1

    DEVICE.set_wait_callback(note if on else None)
    try:
        yield waits
    finally:
        DEVICE.set_wait_callback(None)


def _callers() -> list[str]:
    frame, sites = sys._getframe(2), []
    while frame is not None:
        file = frame.f_code.co_filename
        if not any(part in file for part in _MACHINERY):
            short = file.split("site-packages/")[-1].split("/python/")[-1]
            sites.append(f"{short}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return sites
