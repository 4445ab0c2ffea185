"""Imported once by the fork server from which the tests' scheduler processes are forked.

SGLang's imports take longer than any of the tests. It also writes down what the drafter proposes:
one JSON line a request and verify step into the file `$DFLARE_TEST_TRACE`.
"""

import json
import os

import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler  # noqa: F401
from sglang.srt.models.registry import ModelRegistry

import dflare.engine.attention
import dflare.engine.models.qwen_dflare
import dflare.engine.sampling  # noqa: F401
from dflare.engine.worker import DFlareWorker

ModelRegistry.get_supported_archs()


def _trace_proposals(path: str) -> None:
    step, accept = DFlareWorker.forward_batch_generation, DFlareWorker._accept_block

    def forward_batch_generation(self, batch, *args, **kwargs):
        self._traced_reqs = list(batch.reqs)
        return step(self, batch, *args, **kwargs)

    def _accept_block(self, *, candidates, prefix_lens, **kwargs):
        # Every tensor-parallel rank gets here with the same proposals.
        with open(path if self._target_tp_rank == 0 else os.devnull, "a") as file:
            for req, block, length in zip(
                self._traced_reqs, candidates.tolist(), prefix_lens.tolist(), strict=True
            ):
                file.write(json.dumps({"rid": req.rid, "prefix": length, "block": block}) + "\n")
        return accept(self, candidates=candidates, prefix_lens=prefix_lens, **kwargs)

    DFlareWorker.forward_batch_generation = forward_batch_generation
    DFlareWorker._accept_block = _accept_block


_trace_proposals(os.environ["DFLARE_TEST_TRACE"])
