"""Memory on the CPU platform: weights and K/V in huge pages, and what keeps slots in order."""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

_HUGE_PAGE = 1 << 21


def huge_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in huge pages where the system gives them, all of them touched.

    A decode step reads every weight once: with small pages the processor looks up a page every
    4 KiB. And a page that a step touches first costs it a fault.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a kernel without them, another system
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(*shape).zero_()


def move_to_huge_pages(model: torch.nn.Module) -> None:
    """Move every weight of two huge pages and more."""
    for parameter in model.parameters():
        if parameter.nbytes >= 2 * _HUGE_PAGE and parameter.is_contiguous():
            parameter.data = huge_zeros(parameter.shape, parameter.dtype).copy_(parameter.data)


class CpuKVPool(MHATokenToKVPool):
    """`MHATokenToKVPool` in huge pages; slot moves are indexing instead of a Triton copy."""

    def _create_buffers_normal(self) -> None:
        k_shape, v_shape = self._kv_buffer_shapes()
        self.k_buffer = [huge_zeros(k_shape, self.store_dtype) for _ in range(self.layer_num)]
        self.v_buffer = [huge_zeros(v_shape, self.store_dtype) for _ in range(self.layer_num)]

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None
        self.use_native_move_kv_cache = True


def speculative_cache_locs(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
    device,
) -> torch.Tensor:
    """Slots of the `draft_token_num` tokens that follow `start_offset` in each request.

    Args:
        req_pool_indices: [bs], row of each request in `req_to_token`.
        req_to_token: [rows, max_len] int32 slots.
        start_offset: [bs], first token index; `end_offset` is `start_offset + draft_token_num`.

    Returns:
        [bs * draft_token_num] int64 slots, row-major.
    """
    tokens = start_offset.long()[:, None] + torch.arange(draft_token_num)
    return req_to_token[req_pool_indices.long()[:, None], tokens].reshape(-1).long()


def assign_req_to_token_pool(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write newly allocated slots into the token table: request b gets [start_b, end_b).

    Args:
        req_pool_indices: [bs]; start_offset, end_offset: [bs] token indices.
        req_to_token: [rows, max_len] int32, written in place.
        out_cache_loc: [sum(end - start)] slots, requests one after the other.
    """
    # In NumPy: torch's repeat_interleave wakes all threads, for microseconds of work.
    starts = start_offset.numpy()
    lengths = end_offset.numpy() - starts
    rows = np.repeat(req_pool_indices.numpy(), lengths)
    first = np.cumsum(lengths) - lengths
    columns = np.arange(out_cache_loc.numel()) + np.repeat(starts - first, lengths)
    req_to_token.numpy()[rows, columns] = out_cache_loc.numpy()


def allow_record_stream_on_cpu() -> None:
    """Make `Tensor.record_stream` a no-op for CPU tensors.

    `DFlashWorkerV2` records the current stream on `batch.seq_lens`; torch has a CPU "stream"
    object but its `record_stream` rejects it, and there is nothing to record.
    """
    record_stream = torch.Tensor.record_stream

    def record(tensor: torch.Tensor, stream) -> None:
        if tensor.device.type != "cpu":
            record_stream(tensor, stream)

    torch.Tensor.record_stream = record  # type: ignore[method-assign,assignment]
