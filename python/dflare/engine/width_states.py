"""What decode steps of each width run with: buffers, attention backends and CUDA graphs.

`DFlashWorkerV2` sizes its step by one block, and most attention backends and every captured graph
fix the tokens per request when they are built. So each width gets its own set, built under a spec
configuration of that width as EAGLE's adaptive mode does (sglang/srt/speculative/
eagle_worker_v2.py, build_adaptive_runtime_state), and a step swaps its set in and out.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.runtime_context import get_exec, get_parallel, get_spec
from sglang.srt.speculative import dflash_utils
from sglang.srt.speculative.draft_worker_common import (
    build_block_pos_offsets,
    make_draft_block_spec_info,
    make_draft_sampler_capture_hook,
)
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite
from sglang.srt.speculative.spec_utils import draft_pp_context, draft_tp_context

from dflare.engine.swapping import swapped
from dflare.engine.tree_draft import MarginalsSampler
from dflare.errors import UnsupportedError

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
# Tensors that steps make on first use too, of sizes that have nothing to do with the block.
_UNSIZED_BUFFERS = {
    "_draft_greedy_gathered_max_buf",
    "_draft_greedy_gathered_ids_buf",
    "_draft_greedy_local_max_buf",
    "_draft_greedy_local_arg_buf",
    "_draft_greedy_best_rank_buf",
    "_draft_greedy_rank_index_buf",
    "_draft_greedy_selected_ids_buf",
}
_LEAST_FREE_GB = 1.0  # below it DFLASH captures no draft graphs either
# Each captured batch size of a width is so many times the next smaller one; a batch between two is
# padded. Every size has two graphs where the width drafts, one where it does not.
_BATCH_RATIO, _PLAIN_BATCH_RATIO = 2.0, 1.2

State = list[tuple[Any, dict[str, Any]]]


def batches_to_capture(sizes: Sequence[int], width: int) -> list[int]:
    """Batch sizes of the graphs of a width other than the block, which has all of them.

    Args:
        sizes: those that SGLang captures, ascending.
        width: tokens a request.
    """
    ratio = _PLAIN_BATCH_RATIO if width == 1 else _BATCH_RATIO
    kept = [sizes[0]]
    for size in sizes[1:]:
        if size >= ratio * kept[-1] or size == sizes[-1]:
            kept.append(size)
    return kept


class WidthStates:
    """One set of sized attributes a width, of the worker and its two model runners."""

    def __init__(self, worker: Any, widths: Sequence[int], trees: Sequence[int] = ()) -> None:
        """Build what every width but the block needs; on CUDA this captures graphs.

        Where memory is short trees and widths are left out, the widest first: half of what is free
        now is for their graphs, the other half for whatever serving needs.

        Args:
            worker: a `DFlareWorker` whose own attention backends and graphs are ready.
            widths: verify widths, ascending, at most the worker's block size.
            trees: nodes of a tree that the target verifies, ascending. It is drafted by a whole
                block, so that the target alone runs otherwise than at the block's width.
        """
        self._worker = worker
        self._block = int(worker.block_size)
        # By width, and whether it is a tree's.
        self._states: dict[tuple[int, bool], State] = {(self._block, False): []}
        on_cpu = torch.device(worker.device).type == "cpu"
        budget = _Budget(None if on_cpu else self._free_memory_gb)
        drafting: State | None = None
        wanted = [(width, False) for width in widths if width != self._block]
        wanted += [(nodes, True) for nodes in trees]
        for width, tree in wanted:
            if not budget.has_room():
                break
            state: State = [] if tree else [(worker, _sized_attributes(worker, width))]
            if not on_cpu:  # the CPU backend takes the width from the batch
                with budget.spending():
                    state += self._tree_attributes(width) if tree else self._attributes(width)
                    if tree and drafting is None:  # the same for all trees
                        drafting = self._tree_draft_attributes(max(trees))
                state += drafting or []
            self._states[width, tree] = state
        self.widths = tuple(w for w in widths if (w, False) in self._states)
        self.trees = tuple(n for n in trees if (n, True) in self._states)
        dropped = [str(w) for w in widths if w not in self.widths]
        dropped += [f"{n} (trees)" for n in trees if n not in self.trees]
        if dropped:
            logger.warning(
                "DFLARE: no CUDA graphs for verify widths %s, which are left out: %s. Lower "
                "--mem-fraction-static or --cuda-graph-max-bs to have them",
                ", ".join(dropped),
                budget.describe(),
            )
        self.graph_gb = budget.spent

    @contextmanager
    def at(self, width: int, *, tree: bool = False) -> Iterator[None]:
        """Run the worker at a width; outside it has the block's set, as prefills expect."""
        block = _swap(self._states[width, tree])
        try:
            yield
        finally:
            self._states[width, tree] = _swap(block)

    def _tree_attributes(self, nodes: int) -> State:
        """The target's attention backend and graphs, which read a mask.

        For chains SGLang captures graphs without one where the backend does without.
        """
        target = self._worker.model_runner
        masked = {
            "resolve_dflash_verify_mask_policy": lambda backend: (type(backend).__name__, True)
        }
        with (
            get_spec().override(speculative_num_draft_tokens=nodes),
            swapped(dflash_utils, **masked),
        ):
            return [(target, self._build(target, nodes))]

    def _attributes(self, width: int) -> State:
        """Attention backends and graphs of target and draft, where they depend on the width."""
        worker = self._worker
        target, draft = worker.model_runner, worker.draft_model_runner
        with get_spec().override(speculative_num_draft_tokens=width):
            state: State = [(target, self._build(target, width))]
            if width > 1:
                with (
                    draft_pp_context(),
                    draft_tp_context(worker.draft_parallel_layout),
                    swapped(worker, block_size=width),
                ):
                    state += self._draft_attributes(draft, width)
        return state

    def _tree_draft_attributes(self, nodes: int) -> State:
        """The drafter's graphs of a block that end with the best tokens of each depth."""
        worker = self._worker
        if worker._draft_sampler is None:  # they end with states, or there are none
            return []
        largest = max(get_exec().graph.cuda_graph_config.decode.bs)
        sampler = MarginalsSampler(worker, nodes - 1, largest)
        with draft_pp_context(), draft_tp_context(worker.draft_parallel_layout):
            return self._sampling_attributes(worker.draft_model_runner, self._block, sampler)

    def _draft_attributes(self, draft: Any, width: int) -> State:
        if self._worker._draft_sampler is None:
            return [(draft, self._build(draft, width))]
        return self._sampling_attributes(draft, width, self._worker._maybe_build_draft_sampler())

    def _sampling_attributes(self, draft: Any, width: int, sampler: Any) -> State:
        """The drafter's backend and graphs, at whose end a sampler takes the tokens."""
        worker = self._worker
        # The block's sampler is captured into the block's graphs by a hook of its own.
        others = [hook for hook in draft.capture_tail_hooks if hook is not worker.sampler_hook]
        hooks = [*others, make_draft_sampler_capture_hook(sampler)]
        with swapped(draft, capture_tail_hooks=hooks):
            built = self._build(draft, width)
        return [(draft, built), (worker, {"_draft_sampler": sampler})]

    def _build(self, runner: Any, width: int) -> dict[str, Any]:
        """A model runner's attention backend and graphs at a width."""
        backend = runner._get_attention_backend()
        graphs = runner.decode_cuda_graph_runner
        if isinstance(graphs, DecodeCudaGraphRunner):
            decode = get_exec().graph.cuda_graph_config.decode
            with swapped(decode, bs=batches_to_capture(sorted(decode.bs), width)):
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


class _Budget:
    """Device memory that the graphs of further widths may take, in GB."""

    def __init__(self, free: Callable[[], float] | None) -> None:
        """
        Args:
            free: gives what is free; None where graphs take nothing.
        """
        self._free = free
        self._limit = (free() - _LEAST_FREE_GB) / 2 if free else 0.0
        self.spent = self._largest = 0.0

    def has_room(self) -> bool:
        """Whether a width fits that takes as much as the dearest so far."""
        return self._free is None or self.spent + self._largest <= self._limit

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count what building a width takes."""
        assert self._free is not None
        before = self._free()
        yield
        taken = max(0.0, before - self._free())
        self.spent += taken
        self._largest = max(self._largest, taken)

    def describe(self) -> str:
        """What there was, for the log."""
        return (
            f"{self.spent:.2f} of {max(0.0, self._limit):.2f} GB are spent and a width took up to "
            f"{self._largest:.2f} GB"
        )


def tensors_of(worker: Any) -> dict[str, list[int]]:
    """Identities of the tensors that an object's attributes hold, by attribute."""
    found = {}
    for name, value in vars(worker).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        tensors = [id(item) for item in values if isinstance(item, torch.Tensor)]
        if tensors:
            found[name] = tensors
    return found


def check_nothing_is_shared(before: dict[str, list[int]], worker: Any) -> None:
    """Refuse an SGLang whose worker makes a buffer in a step that we do not know.

    It might be sized by the block, and all widths would share it in silence.

    Args:
        before: `tensors_of` the worker before its first step.
        worker: after steps of every width.

    Raises:
        UnsupportedError: naming the attributes.
    """
    known = {*_DRAFT_BUFFERS, *_ACCEPT_BUFFER_PAIRS, "_accept_len_buf", *_UNSIZED_BUFFERS}
    after = tensors_of(worker)
    strange = sorted(n for n in after if n not in known and after[n] != before.get(n))
    if strange:
        raise UnsupportedError(
            f"this SGLang's DFLASH worker makes {', '.join(strange)} in a decode step, unknown to "
            "DFLARE: verify widths might share them. Install the SGLang that README.md "
            "names, or set DFLARE_ADAPTIVE=off"
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
