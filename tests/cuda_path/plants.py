"""Bugs put in on purpose, to see that the tests on the device show them.

Each function changes this process only; `test_device_plants` says how each is found.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dflare.engine.cuda_attention import CudaBlockAttentionBackend
from dflare.engine.width_states import WidthStates
from dflare.engine.worker import DFlareWorker

PLANTS: dict[str, Callable[[], None]] = {}


def _plant(function: Callable[[], None]) -> Callable[[], None]:
    PLANTS[function.__name__] = function
    return function


def plant(name: str) -> None:
    """Put the bug of this name into the process."""
    PLANTS[name]()


def _caller() -> str:
    """File and function that called the function that asks."""
    code = sys._getframe(2).f_code
    return f"{code.co_filename} {code.co_name}"


@_plant
def no_wait_for_scheduler() -> None:
    """The forward stream does not wait for the stream on which the batch was prepared."""
    torch.cuda.Stream.wait_stream = lambda self, other: None  # type: ignore[method-assign]


@_plant
def results_read_too_early() -> None:
    """The scheduler reads a step's tokens before their copy to the host is done."""
    wait = torch.cuda.Event.synchronize

    def synchronize(event: Any) -> None:
        if "batch_result_processor" not in _caller():
            wait(event)

    torch.cuda.Event.synchronize = synchronize  # type: ignore[method-assign]


@_plant
def schedule_outside_the_graph() -> None:
    """The schedule is made anew each step, but the graph reads the one of its capture."""
    make = CudaBlockAttentionBackend.init_forward_metadata_in_graph
    CudaBlockAttentionBackend.init_forward_metadata_in_graph = (  # type: ignore[method-assign]
        lambda self, batch: None
    )
    CudaBlockAttentionBackend.init_forward_metadata_out_graph = (  # type: ignore[method-assign]
        lambda self, batch, in_capture=False: make(self, batch)
    )


@_plant
def host_waits_in_plain_step() -> None:
    """The plain step reads a tensor of the device."""
    accept = DFlareWorker._accept_block

    def read(worker: Any, *, prefix_lens: torch.Tensor, **kwargs: Any) -> Any:
        if worker.block_size == 1:
            int(prefix_lens.sum())
        return accept(worker, prefix_lens=prefix_lens, **kwargs)

    DFlareWorker._accept_block = read  # type: ignore[method-assign]


@_plant
def staging_buffer_reused() -> None:
    """A pinned buffer is written again before its copy to the device has run."""
    staging = torch.zeros(64, dtype=torch.long, pin_memory=True)
    accept = DFlareWorker._accept_block

    def stage(worker: Any, *, next_token_logits: Any, **kwargs: Any) -> Any:
        count = len(next_token_logits)
        staging[:count] = torch.arange(count)
        rows = torch.empty(count, dtype=torch.long, device="cuda")
        rows.copy_(staging[:count], non_blocking=True)
        staging.fill_(0)
        return accept(worker, next_token_logits=next_token_logits[rows], **kwargs)

    DFlareWorker._accept_block = stage  # type: ignore[method-assign]


@_plant
def wait_during_capture() -> None:
    """Something inside a graph's capture reads a tensor of the device."""
    make = CudaBlockAttentionBackend.init_forward_metadata_in_graph

    def read(backend: Any, batch: Any) -> None:
        batch.seq_lens.max().item()
        make(backend, batch)

    CudaBlockAttentionBackend.init_forward_metadata_in_graph = read  # type: ignore[method-assign]


@_plant
def buffer_shared_between_widths() -> None:
    """A narrower step writes its drafted tokens into the buffer of the block."""
    at = WidthStates.at

    @contextmanager
    def keep(states: WidthStates, width: int, *, tree: bool = False) -> Iterator[None]:
        worker = states._worker
        of_block = worker._draft_block_tokens_buf
        with at(states, width, tree=tree):
            own = worker._draft_block_tokens_buf
            if of_block is not None:
                worker._draft_block_tokens_buf = of_block
            try:
                yield
            finally:
                worker._draft_block_tokens_buf = own

    WidthStates.at = keep  # type: ignore[method-assign]


def _leave_in_place(name: str, owner: str, attribute: str) -> None:
    """After a step of a width, an object of its set stays for steps of the block and prefills."""

    def put_in() -> None:
        at = WidthStates.at

        @contextmanager
        def leave(states: WidthStates, width: int, *, tree: bool = False) -> Iterator[None]:
            holder = getattr(states._worker, owner) if owner else states._worker
            with at(states, width, tree=tree):
                yield
                left = getattr(holder, attribute)
            setattr(holder, attribute, left)

        WidthStates.at = leave  # type: ignore[method-assign]

    PLANTS[name] = put_in


_leave_in_place("targets_backend_left_in_place", "model_runner", "attn_backend")
_leave_in_place("targets_graphs_left_in_place", "model_runner", "decode_cuda_graph_runner")
_leave_in_place("drafters_graphs_left_in_place", "draft_model_runner", "decode_cuda_graph_runner")
_leave_in_place("sampler_left_in_place", "", "_draft_sampler")
