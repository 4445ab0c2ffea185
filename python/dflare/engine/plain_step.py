"""The decode step of width 1: the target alone, and the drafter's context kept up to date.

`DFlashWorkerV2.forward_batch_generation` would do it too, but prepares a block, embeddings and a
draft batch on the way, which a step of one token a request cannot hide.
"""

from typing import Any

import torch
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.managers.scheduler import GenerationBatchResult
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dflash_utils import apply_dflash_verify_logits_adjustments
from sglang.srt.speculative.spec_sampling_mask import SpeculativeSamplingMaskCapture
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask


def plain_step(
    worker: Any, batch: Any, on_publish: Any = None, grammar_barrier: Any = None
) -> GenerationBatchResult:
    """Verify the anchors alone; every request commits exactly the target's next token.

    Args:
        worker: a `DFlareWorker` at width 1.
        batch: SGLang's `ScheduleBatch` in decode mode, with the anchors in its `spec_info`.
        on_publish: told the new lengths as soon as they are known (overlap scheduling).
        grammar_barrier: waits until the grammars have seen the previous step.
    """
    worker._validate_phase1_sampling_support(batch)
    draft_input, sampling_info = batch.spec_info, batch.sampling_info
    lens = batch.seq_lens
    # The previous step may have made it on another stream.
    lens.record_stream(torch.get_device_module(worker.device).current_stream())
    positions = lens.long()
    anchors = draft_input.bonus_tokens.view(-1)
    # Where a wider step would keep its block; penalties look for it there.
    candidates = worker._draft_block_tokens_buf = anchors[:, None]
    grammar_tree = GrammarTree.from_linear_chain(candidates) if batch.has_grammar else None

    forward_batch, plan = _prepare_verify(worker, batch, draft_input, anchors, positions)
    target = worker.target_worker.forward_batch_generation(
        batch=None, forward_batch=forward_batch, is_verify=True, skip_attn_backend_init=True
    )
    output = target.logits_output
    predicted = _gather_logits(worker, batch, output)
    if grammar_tree is not None:
        mask = build_grammar_vocab_mask(
            reqs=batch.reqs,
            tree=grammar_tree,
            sampling_info=sampling_info,
            device=output.next_token_logits.device,
            barrier=grammar_barrier,
        )
    if sampling_info is not None and predicted is None:
        apply_dflash_verify_logits_adjustments(
            next_token_logits=output.next_token_logits,
            sampling_info=sampling_info,
            draft_token_num=1,
        )
    if grammar_tree is not None and mask is not None:
        mask.apply(output.next_token_logits)

    tokens = worker._accept_anchors(
        candidates=candidates,
        next_token_logits=output.next_token_logits,
        sampling_info=sampling_info,
        draft_input=draft_input,
        prefix_lens=lens,
        target_predict=predicted,
    )
    commit_lens = torch.ones(len(lens), dtype=torch.int32, device=lens.device)
    new_lens = lens + 1
    _add_outputs(batch, output, draft_input, tokens, commit_lens)
    if worker._need_mamba_verify_commit:
        worker._update_target_mamba_state_after_verify(
            batch=batch,
            seq_lens_pre_verify=lens.clone(),
            seq_lens_post_verify=new_lens,
            commit_lens=commit_lens,
        )
    if on_publish is not None:
        on_publish(new_lens)
    worker.deferred_context.add(output.hidden_states, worker._draft_write_ids(plan), positions)
    output.hidden_states = None  # overlap scheduling would copy it to the host
    return GenerationBatchResult(
        logits_output=output,
        next_token_ids=tokens,
        accept_lens=commit_lens,
        can_run_cuda_graph=target.can_run_cuda_graph,
        next_draft_input=worker._make_next_draft_input_decode(
            bonus_tokens=tokens, new_seq_lens=new_lens
        ),
        speculative_num_draft_tokens=1,
        new_seq_lens=new_lens,
        routed_experts_output=target.routed_experts_output,
        indexer_topk_output=target.indexer_topk_output,
    )


def _prepare_verify(
    worker: Any, batch: Any, draft_input: Any, anchors: torch.Tensor, positions: torch.Tensor
) -> tuple[Any, Any]:
    """The target's forward batch, and the plan of the slots that it writes."""
    runner = worker.model_runner
    table = runner.req_to_token_pool.req_to_token
    batch.out_cache_loc = table[batch.req_pool_indices, positions].long()
    known, known_sum = batch.seq_lens_cpu, batch.seq_lens_sum
    plan = runner.kv_index_translator.plan(
        req_pool_indices=batch.req_pool_indices,
        seq_lens=batch.seq_lens,
        seq_lens_cpu=draft_input.nxt_kv_lens_cpu if known is None else known,
        write_virtual=batch.out_cache_loc,
        read_extent=1,
    )
    verify = DFlashVerifyInput(
        draft_token=anchors, positions=positions, draft_token_num=1, kv_loc_plan=plan
    )
    # The host's bound on the lengths includes what this step writes.
    if known is not None:
        batch.seq_lens_cpu = known + 1
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
    elif draft_input.nxt_kv_lens_cpu is not None:
        batch.seq_lens_cpu = draft_input.nxt_kv_lens_cpu
        batch.seq_lens_sum = int(draft_input.nxt_kv_lens_sum)
    forward_batch, _ = verify.prepare_for_verify(batch, worker.target_worker)
    batch.seq_lens_cpu, batch.seq_lens_sum = known, known_sum
    return forward_batch, plan


def _gather_logits(worker: Any, batch: Any, output: Any) -> torch.Tensor | None:
    """Complete logits that tensor-parallel ranks still hold in parts, or their argmax if enough."""
    processor = worker._target_logits_processor
    if processor is None or not processor.is_deferred_shard(output.next_token_logits):
        return None
    if worker._can_skip_verify_logits(batch, batch.sampling_info):
        predicted = processor.deferred_argmax(output.next_token_logits)
        output.next_token_logits = None
        return predicted
    output.next_token_logits = processor.finish_deferred_gather(output.next_token_logits)
    return None


def _add_outputs(
    batch: Any, output: Any, draft_input: Any, tokens: torch.Tensor, commit_lens: torch.Tensor
) -> None:
    """Logprobs and sampling masks, for requests that ask for them."""
    capture = SpeculativeSamplingMaskCapture.from_logits(
        batch.sampling_info,
        next_token_logits=output.next_token_logits,
        draft_input=draft_input,
        draft_token_num=1,
        bs=len(batch.seq_lens),
    )
    if capture is not None:
        output.sampling_mask_output = capture.build_output(
            out_tokens=tokens[:, None], commit_lens=commit_lens
        )
    if batch.return_logprob:
        compute_spec_logprobs(batch, output, tokens, chain_stride=1)
