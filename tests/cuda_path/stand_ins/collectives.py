"""NCCL by gloo: a collective of device tensors is one task on the stream, on the same memory."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from device import DEVICE


class _Enqueued:
    """The work that an asynchronous collective returns: the stream knows when it is done."""

    def wait(self, *_args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def install() -> None:
    """Let every process group of NCCL be one of gloo and let collectives run on the stream."""
    _use_gloo()
    for name, written in (
        ("all_reduce", "tensor"),
        ("broadcast", "tensor"),
        ("all_gather_into_tensor", "output_tensor"),
        ("all_gather", "tensor_list"),
        ("reduce_scatter_tensor", "output"),
        ("send", ""),
        ("recv", "tensor"),
    ):
        _put_on_stream(name, written)
    import sglang.srt.distributed.device_communicators.pynccl as pynccl

    pynccl.PyNcclCommunicator = _Communicator  # type: ignore[misc]
    # Logits are gathered through multicast memory of NVLink where there is some, else as above.
    import sglang.srt.distributed.device_communicators.triton_symm_mem_ag as multimem

    multimem.MultimemAllGatherer._build = lambda *_: None  # type: ignore[method-assign]


class _Communicator:
    """In place of SGLang's own binding of NCCL, which graphs capture: collectives as above."""

    available = True
    disabled = False

    def __init__(self, group: Any, *_args: Any, **_kwargs: Any) -> None:
        self.group = group

    @contextmanager
    def change_state(self, *_args: Any, **_kwargs: Any) -> Iterator[None]:
        yield

    def all_reduce(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)

    def outplace_all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        out = tensor.clone()
        dist.all_reduce(out, group=self.group)
        return out

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        dist.broadcast(tensor, src=dist.get_global_rank(self.group, src), group=self.group)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        dist.all_gather_into_tensor(output, tensor, group=self.group)


def _use_gloo() -> None:
    original_init, original_group = dist.init_process_group, dist.new_group

    def init_process_group(backend=None, *args, **kwargs):
        return original_init("gloo" if backend in (None, "nccl") else backend, *args, **kwargs)

    def new_group(*args, backend=None, **kwargs):
        return original_group(*args, backend="gloo" if backend == "nccl" else backend, **kwargs)

    _replace("init_process_group", init_process_group)
    _replace("new_group", new_group)


def _replace(name: str, function: Any) -> None:
    setattr(dist, name, function)
    setattr(dist.distributed_c10d, name, function)


def _put_on_stream(name: str, written: str) -> None:
    original = getattr(dist, name)
    parameters = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = parameters.bind(*args, **kwargs)
        tensors = {key: list(_tensors(value)) for key, value in bound.arguments.items()}
        if not any(t.is_cuda for found in tensors.values() for t in found):
            return original(*args, **kwargs)
        asynchronous = bound.arguments.pop("async_op", False)
        host = {key: _on_host(value) for key, value in bound.arguments.items()}

        def run() -> None:
            original(**host)

        reads = [t for key, found in tensors.items() for t in found if key != written]
        DEVICE.enqueue(f"collective::{name}", run, reads=reads, writes=tensors.get(written, []))
        return _Enqueued() if asynchronous else None

    _replace(name, call)


def _tensors(value: Any):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return DEVICE.alias(value)
    if isinstance(value, list):
        return [_on_host(item) for item in value]
    return value
