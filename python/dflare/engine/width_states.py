"""What decode steps of each width run with: buffers, attention backends and CUDA graphs.

`DFlashWorkerV2` sizes its step by one block, and most attention backends and every captured graph
fix the tokens per request when they are built. So each width gets its own set, built under a spec
configuration of that width as EAGLE's adaptive mode does (sglang/srt/speculative/
eagle_worker_v2.py, build_adaptive_runtime_state), and a step swaps its set in and out.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.runtime_context import get_parallel, get_spec
from sglang.srt.speculative.draft_worker_common import (
    build_block_pos_offsets,
    make_draft_block_spec_info,
    make_draft_sampler_capture_hook,
)
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite
from sglang.srt.speculative.spec_utils import draft_pp_context, draft_tp_context

logger = logging.getLogger(__name__)

# Attributes of the worker that hold one row a request or a block: made on first use by
# DFlashWorkerV2._ensure_draft_block_buffers ...
_DRAFT_BUFFERS = (
    "_draft_block_ids_buf",
    "_draft_block_positions_buf",
    "_draft_block_tokens_buf",
    "_draft_verify_out_cache_loc_buf",
    "_draft_block_end_buf",
    "_draft_seq_lens_cpu_buf",
)
# ... and by _ensure_accept_bonus_buffers.
_ACCEPT_BUFFER_PAIRS = (
    "_commit_lens_bufs",
    "_bonus_id_bufs",
    "_out_tokens_bufs",
    "_new_seq_lens_bufs",
)
_LEAST_FREE_GB = 1.0  # below it DFLASH captures no draft graphs either

State = list[tuple[Any, dict[str, Any]]]


class WidthStates:
    """One set of sized attributes a width, of the worker and its two model runners."""

    def __init__(self, worker: Any, widths: Sequence[int]) -> None:
        """Build what every width but the block needs; on CUDA this captures graphs.

        Args:
            worker: a `DFlareWorker` whose own attention backends and graphs are ready.
            widths: verify widths, at most the worker's block size.
        """
        self._worker = worker
        self._block = int(worker.block_size)
        self._states: dict[int, State] = {}
        for width in widths:
            if width != self._block:
                self._states[width] = [(worker, _sized_attributes(worker, width))]
                self._states[width] += self._runner_attributes(width)

    @contextmanager
    def at(self, width: int) -> Iterator[None]:
        """Run the worker at a width; outside it has the block's set, as prefills expect."""
        if width == self._block:
            yield
            return
        block = _swap(self._states[width])
        try:
            yield
        finally:
            self._states[width] = _swap(block)

    def _runner_attributes(self, width: int) -> State:
        """Attention backends and graphs of target and draft, where they depend on the width."""
        worker = self._worker
        if torch.device(worker.device).type == "cpu":
            # The CPU backend takes the width from the batch.
            return []
        target, draft = worker.model_runner, worker.draft_model_runner
        with get_spec().override(speculative_num_draft_tokens=width):
            state: State = [(target, self._build(target, width))]
            if width > 1:
                with (
                    draft_pp_context(),
                    draft_tp_context(worker.draft_parallel_layout),
                    _swapped([(worker, {"block_size": width})]),
                ):
                    state += self._draft_attributes(draft, width)
        return state

    def _draft_attributes(self, draft: Any, width: int) -> State:
        worker = self._worker
        if worker._draft_sampler is None:
            return [(draft, self._build(draft, width))]
        # The block's sampler is captured into the block's graph by the hook added last.
        sampler = worker._maybe_build_draft_sampler()
        hooks = [*draft.capture_tail_hooks[:-1], make_draft_sampler_capture_hook(sampler)]
        with _swapped([(draft, {"capture_tail_hooks": hooks})]):
            built = self._build(draft, width)
        return [(draft, built), (worker, {"_draft_sampler": sampler})]

    def _build(self, runner: Any, width: int) -> dict[str, Any]:
        """A model runner's attention backend and graphs at a width.

        Where the block has no graphs, or memory is short, the width runs eagerly on its own
        backend: correct, and dear in the measured step times.
        """
        backend = runner._get_attention_backend()
        graphs = runner.decode_cuda_graph_runner
        if isinstance(graphs, DecodeCudaGraphRunner):
            if self._free_memory_gb() < _LEAST_FREE_GB:
                logger.warning("no CUDA graphs at width %d: less than 1 GB is free", width)
                graphs = None
            else:
                graphs = type(graphs)(
                    runner, attn_backend=backend, speculative_num_draft_tokens=width
                )
        return {"attn_backend": backend, "decode_cuda_graph_runner": graphs}

    def _free_memory_gb(self) -> float:
        """The least free memory of all ranks, so that they capture the same graphs."""
        worker = self._worker
        return worker._tp_sync.available_memory_gb(
            SpecTpSyncSite.DFLASH_MEM, worker.device, worker.gpu_id, group=get_parallel().tp_group
        )


def _sized_attributes(worker: Any, width: int) -> dict[str, Any]:
    sized: dict[str, Any] = {name: [] for name in _ACCEPT_BUFFER_PAIRS}
    sized |= dict.fromkeys(_DRAFT_BUFFERS)
    sized |= {
        "block_size": width,
        "speculative_num_draft_tokens": width,
        "_block_pos_offsets": build_block_pos_offsets(length=width, device=worker.device),
        "_draft_block_spec_info": make_draft_block_spec_info(
            draft_token_num=width, device=worker.device
        ),
        "_accept_len_buf": None,
        "_accept_bonus_buffer_cap": 0,
    }
    return sized


def _swap(state: State) -> State:
    """Set the attributes and return what they replace."""
    replaced = []
    for owner, attributes in state:
        replaced.append((owner, {name: getattr(owner, name) for name in attributes}))
        for name, value in attributes.items():
            setattr(owner, name, value)
    return replaced


@contextmanager
def _swapped(state: State) -> Iterator[None]:
    replaced = _swap(state)
    try:
        yield
    finally:
        _swap(replaced)
