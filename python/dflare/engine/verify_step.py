"""A decode step without a draft pass: the target verifies tokens that are known beforehand."""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.managers.scheduler import GenerationBatchResult
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dflash_utils import apply_dflash_verify_logits_adjustments
from sglang.srt.speculative.spec_sampling_mask import SpeculativeSamplingMaskCapture
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask


def verify_candidates(
    worker: Any,
    batch: Any,
    candidates: torch.Tensor,
    slots: torch.Tensor,
    on_publish: Any = None,
    grammar_barrier: Any = None,
) -> GenerationBatchResult:
    """Verify a chain of tokens a request; of one, the anchor, it is plain decoding.

    DFLASH's step would verify them too, but prepares a block, embeddings and a draft batch on the
    way, which a step without a draft pass cannot hide.

    Args:
        worker: a `DFlareWorker` that is at width w.
        batch: SGLang's `ScheduleBatch` in decode mode.
        candidates: [bs, w] int64, each request's anchor and what may follow it.
        slots: [bs, w] int64, theirs.
        on_publish: told the new lengths as soon as they are known (overlap scheduling).
        grammar_barrier: waits until the grammars have seen the previous step.
    """
    draft_input, sampling_info, lens = batch.spec_info, batch.sampling_info, batch.seq_lens
    bs, width = candidates.shape
    positions = (lens[:, None] + worker._block_pos_offsets).long()
    grammar_tree = GrammarTree.from_linear_chain(candidates) if batch.has_grammar else None
    verify = DFlashVerifyInput(
        draft_token=candidates.flatten(), positions=positions.flatten(), draft_token_num=width
    )
    target, plan = run_target(worker, batch, verify, slots)
    output = target.logits_output
    predicted = adjust_logits(worker, batch, output, grammar_tree, grammar_barrier)
    _, commit_lens, bonus, tokens, new_lens = worker._accept_block(
        candidates=candidates,
        next_token_logits=output.next_token_logits,
        sampling_info=sampling_info,
        draft_input=draft_input,
        prefix_lens=lens,
        bs=bs,
        target_predict=predicted,
    )
    if new_lens is None:
        new_lens = lens + commit_lens
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
    rows = output.hidden_states, worker._draft_write_ids(plan), positions.flatten()
    if width == 1:
        worker.context.defer(*rows)
    else:
        worker.context.append(*rows, block_size=width, commit_lens=commit_lens)
    return step_result(worker, target, tokens, commit_lens, bonus, new_lens)


def step_slots(runner: Any, batch: Any, width: int) -> torch.Tensor:
    """The slots behind each request's tokens, [bs, width] int64.

    Read before the target runs: after that the scheduler may write to the table.

    Args:
        runner: the target's `ModelRunner`.
        batch: in decode mode.
        width: tokens of a request.
    """
    columns = batch.seq_lens[:, None] + torch.arange(width, device=batch.seq_lens.device)
    return runner.req_to_token_pool.req_to_token[batch.req_pool_indices[:, None], columns].long()


def run_target(
    worker: Any, batch: Any, verify: DFlashVerifyInput, slots: torch.Tensor
) -> tuple[Any, Any]:
    """The target's forward over what is verified, and the plan of the slots that it writes.

    Args:
        worker: a `DFlareWorker`.
        batch: in decode mode; its `out_cache_loc` is set.
        verify: `draft_token_num` tokens a request and their positions.
        slots: [bs, draft_token_num] int64, from `step_slots`.
    """
    runner, draft_input, width = worker.model_runner, batch.spec_info, verify.draft_token_num
    batch.out_cache_loc = slots.flatten()
    known, known_sum = batch.seq_lens_cpu, batch.seq_lens_sum
    plan = verify.kv_loc_plan = runner.kv_index_translator.plan(
        req_pool_indices=batch.req_pool_indices,
        seq_lens=batch.seq_lens,
        seq_lens_cpu=draft_input.nxt_kv_lens_cpu if known is None else known,
        write_virtual=batch.out_cache_loc,
        read_extent=width,
    )
    # The host's bound on the lengths includes what this step writes.
    if known is not None:
        batch.seq_lens_cpu = known + width
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
    elif draft_input.nxt_kv_lens_cpu is not None:
        batch.seq_lens_cpu = draft_input.nxt_kv_lens_cpu
        batch.seq_lens_sum = int(draft_input.nxt_kv_lens_sum)
    forward_batch, _ = verify.prepare_for_verify(batch, worker.target_worker)
    batch.seq_lens_cpu, batch.seq_lens_sum = known, known_sum
    target = worker.target_worker.forward_batch_generation(
        batch=None, forward_batch=forward_batch, is_verify=True, skip_attn_backend_init=True
    )
    return target, plan


def adjust_logits(
    worker: Any,
    batch: Any,
    output: Any,
    grammar_tree: GrammarTree | None,
    grammar_barrier: Any,
    spread: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Apply penalties, bias and grammar to the logits of all verified tokens, in place.

    Args:
        spread: puts the logits where SGLang looks for them, as many a request, if `rows` says which
            of those are there, [N] int64.

    Returns:
        Their argmax where nothing else is asked for and ranks hold the logits in parts, else None.
    """
    predicted = _gather_logits(worker, batch, output)
    logits, sampling_info, mask = output.next_token_logits, batch.sampling_info, None
    if grammar_tree is not None:
        mask = build_grammar_vocab_mask(
            reqs=batch.reqs,
            tree=grammar_tree,
            sampling_info=sampling_info,
            device=logits.device,
            barrier=grammar_barrier,
        )
    adjusts = predicted is None and _adjusts(sampling_info)
    if spread and rows is not None and (adjusts or mask is not None):
        logits = spread(logits)
    if adjusts:
        apply_dflash_verify_logits_adjustments(
            next_token_logits=logits,
            sampling_info=sampling_info,
            draft_token_num=len(logits) // len(batch.seq_lens),
        )
    if mask is not None:
        mask.apply(logits)
    if rows is not None and len(logits) > len(rows):
        output.next_token_logits = logits[rows]
    return predicted


def _adjusts(sampling_info: Any) -> bool:
    """Whether a batch asks for anything of what `apply_dflash_verify_logits_adjustments` does."""
    if sampling_info is None:
        return False
    penalizer = sampling_info.penalizer_orchestrator
    added = ("acc_linear_penalties", "grammar_mask", "logit_bias", "dflare_penalise")
    return bool(
        sampling_info.has_custom_logit_processor
        or (penalizer is not None and penalizer.is_required)
        or any(getattr(sampling_info, name, None) is not None for name in added)
    )


def step_result(
    worker: Any,
    target: Any,
    tokens: torch.Tensor,
    commit_lens: torch.Tensor,
    bonus: torch.Tensor,
    new_lens: torch.Tensor,
) -> GenerationBatchResult:
    """What the scheduler gets of a step.

    Args:
        target: what the target's forward gave; nobody needs its hidden states any more.
        tokens: [bs, stride], of which the first `commit_lens` [bs] of each row are committed.
        bonus: [bs] the last of those.
        new_lens: [bs] tokens of each request before its bonus token.
    """
    # Overlap scheduling would copy them to the host.
    target.logits_output.hidden_states = None
    return GenerationBatchResult(
        logits_output=target.logits_output,
        next_token_ids=tokens.flatten(),
        accept_lens=commit_lens,
        can_run_cuda_graph=target.can_run_cuda_graph,
        next_draft_input=worker._make_next_draft_input_decode(
            bonus_tokens=bonus, new_seq_lens=new_lens
        ),
        speculative_num_draft_tokens=tokens.shape[1],
        new_seq_lens=new_lens,
        routed_experts_output=target.routed_experts_output,
        indexer_topk_output=target.indexer_topk_output,
    )


def _gather_logits(worker: Any, batch: Any, output: Any) -> torch.Tensor | None:
    """Complete logits that ranks hold in parts, or give their argmax where that is enough."""
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
    width = tokens.shape[1]
    capture = SpeculativeSamplingMaskCapture.from_logits(
        batch.sampling_info,
        next_token_logits=output.next_token_logits,
        draft_input=draft_input,
        draft_token_num=width,
        bs=len(tokens),
    )
    if capture is not None:
        output.sampling_mask_output = capture.build_output(
            out_tokens=tokens, commit_lens=commit_lens
        )
    if batch.return_logprob:
        compute_spec_logprobs(batch, output, tokens.flatten(), chain_stride=width)
