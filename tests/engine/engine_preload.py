"""Imported once by the fork server from which the tests' scheduler processes are forked.

SGLang's imports take longer than any of the tests. It also writes down what the drafter proposes:
one JSON line a request and verify step into the file `$DFLARE_TEST_TRACE`, and lets the file
`$DFLARE_TEST_WIDTHS` say how wide each decode step is; the package's log goes to the file
`$DFLARE_TEST_LOG` too. Requests can ask to fail.
"""

import json
import logging
import os
import time
from pathlib import Path

import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler  # noqa: F401
import torch
from scripted_arms import ScriptedPolicy, configuration
from sglang.srt.models.registry import ModelRegistry

import dflare.cpu.attention
import dflare.engine.models.qwen_dflare
import dflare.engine.sampling  # noqa: F401
from dflare.adaptive import AdaptiveConfig
from dflare.adaptive.config import VARIABLE
from dflare.engine.arms import measured_policy
from dflare.engine.tree_proposal import TreeProposals
from dflare.engine.worker import DFlareWorker

ModelRegistry.get_supported_archs()
logging.getLogger("dflare").addHandler(
    logging.FileHandler(os.environ["DFLARE_TEST_LOG"], delay=True)
)


def _trace_proposals(path: str) -> None:
    step, accept = DFlareWorker.forward_batch_generation, DFlareWorker._accept_block
    make = TreeProposals.make

    def write(worker, candidates, prefix_lens):
        if worker._traced_reqs is None:
            return  # a dummy step at start-up
        # Every tensor-parallel rank gets here with the same proposals.
        with open(path if worker._target_tp_rank == 0 else os.devnull, "a") as file:
            for req, block, length in zip(
                worker._traced_reqs,
                [block.tolist() for block in candidates],
                prefix_lens.tolist(),
                strict=True,
            ):
                file.write(json.dumps({"rid": req.rid, "prefix": length, "block": block}) + "\n")

    def forward_batch_generation(self, batch, *args, **kwargs):
        self._traced_reqs = list(batch.reqs)
        return step(self, batch, *args, **kwargs)

    def _accept_block(self, *, candidates, prefix_lens, **kwargs):
        write(self, candidates, prefix_lens)
        return accept(self, candidates=candidates, prefix_lens=prefix_lens, **kwargs)

    def propose(self, batch, arm, look_up, most):
        tree = make(self, batch, arm, look_up, most)
        if arm.proposer == "lookup":  # a chain, of which each request may have another part
            counts = (
                tree.counts
                if tree.counts is not None
                else torch.full((len(tree.tokens),), tree.width)
            )
            blocks = [row[:count] for row, count in zip(tree.tokens, counts, strict=True)]
            write(self._worker, blocks, batch.seq_lens)
        return tree

    DFlareWorker._traced_reqs = None
    TreeProposals.make = propose
    DFlareWorker.forward_batch_generation = forward_batch_generation
    DFlareWorker._accept_block = _accept_block


def _script_widths(path: Path) -> None:
    """An engine reads its widths when it starts; scripted ones need no measured step times."""
    turns = None

    def configure(block_size):
        nonlocal turns
        wanted = json.loads(path.read_text())
        if isinstance(wanted, str):
            os.environ[VARIABLE], turns = wanted, None
            return AdaptiveConfig.from_environment(block_size)
        turns = wanted
        return configuration(turns, block_size)

    def make_policy(config, measure):
        return ScriptedPolicy(config, turns) if turns else measured_policy(config, measure)

    DFlareWorker.configure = staticmethod(configure)
    DFlareWorker.make_policy = staticmethod(make_policy)


def _jump(req, now=time.time):
    """A request with `custom_params={"clock_jumps_by": seconds}` moves the scheduler's clock."""
    offset = (req.sampling_params.custom_params or {}).get("clock_jumps_by")
    if offset:
        time.time = lambda: now() + offset


def _fail_when_asked():
    """A request with `custom_params={"fail_in": "prefill"}` (or "decode") raises in such a step."""
    step = DFlareWorker.forward_batch_generation

    def forward_batch_generation(self, batch, *args, **kwargs):
        phase = "prefill" if batch.forward_mode.is_extend() else "decode"
        result = step(self, batch, *args, **kwargs)
        # After the step: pools and the worker's own states have changed by then.
        for req in batch.reqs:
            _jump(req)
            if (req.sampling_params.custom_params or {}).get("fail_in") == phase:
                raise ValueError(f"asked to fail in {phase}")
        return result

    DFlareWorker.forward_batch_generation = forward_batch_generation


def look_on(_config):
    """A hook of `forward_hooks` that changes nothing."""
    return lambda *_: None


_trace_proposals(os.environ["DFLARE_TEST_TRACE"])
_script_widths(Path(os.environ["DFLARE_TEST_WIDTHS"]))
_fail_when_asked()
