"""CPU stand-ins for the Triton kernels with which SGLang keeps its KV slots in order."""

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


class CpuKVPool(MHATokenToKVPool):
    """`MHATokenToKVPool` whose slot moves are plain indexing instead of a Triton copy."""

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
