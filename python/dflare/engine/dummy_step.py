"""A decode step of dummy tokens, to measure what widths cost before anybody waits."""

from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    enable_num_token_non_padded,
)
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_utils import draft_tp_context

_CONTEXT = 128  # tokens before the block


def dummy_step(worker: Any, batch: int) -> None:
    """Draft, verify, accept and append at the worker's present width, and wait for the device.

    All tokens live in slot 0, which SGLang reserves for padding; nothing that a request reads is
    touched.

    Args:
        worker: a `DFlareWorker`, whose `block_size` is the width.
        batch: requests in the step.
    """
    width, device = int(worker.block_size), worker.device
    target = worker.model_runner
    tokens = torch.zeros(batch * width, dtype=torch.long, device=device)
    lens = torch.full((batch,), _CONTEXT, dtype=torch.long, device=device)
    offsets = torch.arange(width, device=device)
    positions = (lens[:, None] + offsets).reshape(-1)
    shared: dict[str, Any] = {
        "forward_mode": ForwardMode.TARGET_VERIFY,
        "batch_size": batch,
        "input_ids": tokens,
        "req_pool_indices": torch.zeros(batch, dtype=torch.long, device=device),
        "seq_lens": lens,
        "out_cache_loc": tokens,
        "seq_lens_cpu": lens.cpu() + width,
        "seq_lens_sum": batch * (_CONTEXT + width),
        "positions": positions,
        "spec_algorithm": SpeculativeAlgorithm.DFLASH,
        "num_token_non_padded": torch.full((), batch * width, dtype=torch.int32, device=device)
        if enable_num_token_non_padded()
        else None,
        "global_num_token_non_padded_cpu": batch * width,
        "can_run_decode_cuda_graph": True,
    }
    plan = target.kv_index_translator.plan(
        req_pool_indices=shared["req_pool_indices"],
        seq_lens=lens,
        seq_lens_cpu=shared["seq_lens_cpu"],
        write_virtual=tokens,
        read_extent=width,
    )
    if width > 1:
        _draft(worker, shared, plan)
    verify = DFlashVerifyInput(draft_token=tokens, positions=positions, draft_token_num=width)
    forward = ForwardBatch(**shared, spec_info=verify, capture_hidden_mode=CaptureHiddenMode.FULL)
    plan.bind(forward, target.kv_index_translator)
    output = target.forward(forward).logits_output
    torch.argmax(output.next_token_logits, dim=-1)
    worker._append_target_hidden_to_draft_kv_by_loc(
        target_hidden=output.hidden_states,
        cache_loc=tokens,
        cache_loc_2d=tokens.view(batch, width),
        positions=positions,
        commit_lens=torch.ones(batch, dtype=torch.int32, device=device),
    )
    if torch.device(device).type != "cpu":
        torch.get_device_module(device).synchronize()
    # The scheduler would take these for the marks of a batch of its own, and let a prefill's writes
    # go ahead of the reads that they stand before.
    for runner in (target, worker.draft_model_runner):
        runner.shared_read_done_event = None


def _draft(worker: Any, shared: dict[str, Any], plan: Any) -> None:
    runner, model = worker.draft_model_runner, worker.model_runner.model
    forward = ForwardBatch(
        **shared,
        input_embeds=model.get_input_embeddings()(shared["input_ids"]),
        spec_info=worker._draft_block_spec_info,
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )
    plan.bind(forward, runner.kv_index_translator)
    with draft_tp_context(worker.draft_parallel_layout):
        output = runner.forward(forward)
        if output.can_run_graph and worker._draft_sampler is not None:
            return  # the head ran inside the graph
        hidden = output.logits_output.hidden_states
        drafted = hidden.view(shared["batch_size"], int(worker.block_size), -1)[:, 1:]
        worker._greedy_sample_from_vocab_parallel_head(
            hidden_states=drafted.reshape(-1, hidden.shape[-1]), lm_head=model.lm_head
        )
