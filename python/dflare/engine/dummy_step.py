"""A batch of dummy requests, to measure what widths cost before anybody waits."""

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.draft_worker_common import make_draft_input_v2

_CONTEXT = 128  # tokens before the block


def dummy_batch(requests: int, runner: Any) -> ScheduleBatch:
    """A decode batch as the scheduler hands it to the worker, of requests that nobody made.

    Their row of `req_to_token` is 0, which belongs to padding and names slot 0 for every token:
    nothing that a request reads is touched.

    Args:
        requests: bs.
        runner: the target's `ModelRunner`.
    """
    device = runner.device
    lens = torch.full((requests,), _CONTEXT, dtype=torch.long, device=device)
    batch = ScheduleBatch(
        reqs=[],
        req_to_token_pool=runner.req_to_token_pool,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        model_config=runner.model_config,
        device=device,
        seq_lens=lens,
        req_pool_indices=torch.zeros(requests, dtype=torch.long, device=device),
    )
    batch.forward_mode = ForwardMode.DECODE
    batch.spec_algorithm = runner.spec_algorithm
    batch.seq_lens_cpu = torch.full((requests,), _CONTEXT, dtype=torch.long)
    batch.seq_lens_sum = requests * _CONTEXT
    batch.spec_info = make_draft_input_v2(
        bonus_tokens=torch.zeros(requests, dtype=torch.long, device=device), new_seq_lens=lens
    )
    batch.can_run_decode_cuda_graph = True
    return batch
