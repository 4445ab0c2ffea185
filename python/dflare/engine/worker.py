"""The speculative worker: SGLang's DFLASH worker with DFlare's context and steps of any width."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.managers.scheduler import GenerationBatchResult
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dflash_utils import (
    apply_dflash_verify_logits_adjustments,
    is_dflash_sampling_verify_available,
)
from sglang.srt.speculative.dflash_worker_v2 import _is_all_greedy
from sglang.srt.speculative.spec_sampling_mask import SpeculativeSamplingMaskCapture
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask

from dflare.engine.cpu_layers import greedy_tokens
from dflare.engine.penalties import Penalised
from dflare.engine.sampling import sample_verify_positions, seeds_of
from dflare.engine.swapping import swapped
from dflare.engine.worker_start import WorkerStart


class DFlareWorker(WorkerStart):
    """Prefill, a block's draft and verification, grammar, logprobs, windows and TP are DFLASH's.

    Ours are how target hidden states become the drafter's context K/V (`context`), which width each
    step has (`widths`), the step that drafts nothing, penalties, and what SGLang's kernel for
    sampled verification does not know.
    """

    def forward_batch_generation(
        self,
        batch: Any,
        on_publish: Any = None,
        grammar_barrier: Any = None,
        pp_proxy_tensors: Any = None,
    ) -> Any:
        """Run a prefill, or one decode step: choose a width, then propose, verify, accept, append.

        Args:
            batch: SGLang's `ScheduleBatch`.
            on_publish: told the new lengths as soon as they are known (overlap scheduling).
            grammar_barrier: waits until the grammars have seen the previous step.
            pp_proxy_tensors: of pipeline parallelism, for prefills.
        """
        mode = batch.forward_mode
        prefill = mode.is_extend() or batch.is_extend_in_batch
        seeds, penalised = seeds_of(batch), self.penalties.select(batch)
        with ExitStack() as stack:
            if seeds is not None:
                stack.enter_context(swapped(batch.sampling_info, sampling_seed=seeds))
            if prefill or mode.is_idle():
                self.widths.interrupt()
                self.context.flush()
                if penalised:
                    stack.enter_context(self.penalties.in_prefill(penalised, batch.sampling_info))
                result = super().forward_batch_generation(
                    batch, on_publish, grammar_barrier, pp_proxy_tensors
                )
                if penalised:
                    self.penalties.commit_prefill(penalised, result.next_token_ids)
                return result
            width = self.widths.choose(batch.reqs)
            self.context.flush([req.rid for req in batch.reqs] if width == 1 else ())
            with self.widths.at(width):
                return self._decode(batch, width, penalised, on_publish, grammar_barrier)

    def _decode(
        self,
        batch: Any,
        width: int,
        penalised: Penalised | None = None,
        on_publish: Any = None,
        grammar_barrier: Any = None,
    ) -> GenerationBatchResult:
        """One step of a width: a block's of DFLASH, or one that verifies the anchors alone."""
        with ExitStack() as stack:
            if penalised:
                block = lambda: self._draft_block_tokens_buf  # noqa: E731 - made by the step
                stack.enter_context(
                    self.penalties.in_verification(penalised, batch.sampling_info, block)
                )
            if width == 1:
                result = self._plain_step(batch, on_publish, grammar_barrier)
            else:
                result = super().forward_batch_generation(batch, on_publish, grammar_barrier)
        if penalised:
            tokens = result.next_token_ids.view(-1, result.speculative_num_draft_tokens)
            self.penalties.commit(penalised, tokens, result.accept_lens)
        return result

    def on_verify_complete_cpu(
        self, num_correct_drafts_per_req: Sequence[int], batch_size: int = 0
    ) -> None:
        """SGLang's hook: the result of the oldest step in flight is on the host."""
        self.widths.complete([n + 1 for n in num_correct_drafts_per_req])

    def note_request_finished(self, *, rid: str, natural_stop: bool) -> None:
        """SGLang's hook: a request ended."""
        self.widths.finish(rid)

    # --- parts of a step ------------------------------------------------------------------

    def _append_target_hidden_to_draft_kv_by_loc(
        self,
        *,
        target_hidden: torch.Tensor,
        cache_loc: torch.Tensor,
        positions: torch.Tensor,
        cache_loc_2d: torch.Tensor | None = None,
        commit_lens: torch.Tensor | None = None,
        extend_lens: torch.Tensor | None = None,
    ) -> None:
        """DFLASH's name for the append, after a prefill and after a block's verification.

        Args:
            target_hidden: [N, T * H] tapped states; cache_loc, positions: [N].
            cache_loc_2d, commit_lens: after a verification, [bs, B] slots and [bs] lengths.
            extend_lens: unused, DFLASH's signature.
        """
        self.context.append(
            target_hidden,
            cache_loc,
            positions,
            block_size=1 if cache_loc_2d is None else cache_loc_2d.shape[1],
            commit_lens=commit_lens,
        )

    def _plain_step(
        self, batch: Any, on_publish: Any = None, grammar_barrier: Any = None
    ) -> GenerationBatchResult:
        """Verify the anchors alone; every request commits exactly the target's next token.

        DFLASH's step would do it too, but prepares a block, embeddings and a draft batch on the
        way, which a step of one token a request cannot hide.

        Args:
            batch: SGLang's `ScheduleBatch` in decode mode, with the anchors in its `spec_info`.
            on_publish: told the new lengths as soon as they are known (overlap scheduling).
            grammar_barrier: waits until the grammars have seen the previous step.
        """
        draft_input, sampling_info = batch.spec_info, batch.sampling_info
        lens = batch.seq_lens
        # The previous step may have made it on another stream.
        lens.record_stream(torch.get_device_module(self.device).current_stream())
        positions = lens.long()
        anchors = draft_input.bonus_tokens.view(-1)
        # Where a wider step would keep its block; penalties look for it there.
        candidates = self._draft_block_tokens_buf = anchors[:, None]
        grammar_tree = GrammarTree.from_linear_chain(candidates) if batch.has_grammar else None

        forward_batch, plan = self._prepare_anchors(batch, draft_input, anchors, positions)
        target = self.target_worker.forward_batch_generation(
            batch=None, forward_batch=forward_batch, is_verify=True, skip_attn_backend_init=True
        )
        output = target.logits_output
        predicted = self._gather_logits(batch, output)
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

        tokens = self._accept_anchors(
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
        if self._need_mamba_verify_commit:
            self._update_target_mamba_state_after_verify(
                batch=batch,
                seq_lens_pre_verify=lens.clone(),
                seq_lens_post_verify=new_lens,
                commit_lens=commit_lens,
            )
        if on_publish is not None:
            on_publish(new_lens)
        self.context.defer(output.hidden_states, self._draft_write_ids(plan), positions)
        output.hidden_states = None  # overlap scheduling would copy it to the host
        return GenerationBatchResult(
            logits_output=output,
            next_token_ids=tokens,
            accept_lens=commit_lens,
            can_run_cuda_graph=target.can_run_cuda_graph,
            next_draft_input=self._make_next_draft_input_decode(
                bonus_tokens=tokens, new_seq_lens=new_lens
            ),
            speculative_num_draft_tokens=1,
            new_seq_lens=new_lens,
            routed_experts_output=target.routed_experts_output,
            indexer_topk_output=target.indexer_topk_output,
        )

    def _prepare_anchors(
        self, batch: Any, draft_input: Any, anchors: torch.Tensor, positions: torch.Tensor
    ) -> tuple[Any, Any]:
        """The target's forward batch, and the plan of the slots that it writes."""
        runner = self.model_runner
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
        forward_batch, _ = verify.prepare_for_verify(batch, self.target_worker)
        batch.seq_lens_cpu, batch.seq_lens_sum = known, known_sum
        return forward_batch, plan

    def _gather_logits(self, batch: Any, output: Any) -> torch.Tensor | None:
        """Complete logits that ranks hold in parts, or give their argmax where that is enough."""
        processor = self._target_logits_processor
        if processor is None or not processor.is_deferred_shard(output.next_token_logits):
            return None
        if self._can_skip_verify_logits(batch, batch.sampling_info):
            predicted = processor.deferred_argmax(output.next_token_logits)
            output.next_token_logits = None
            return predicted
        output.next_token_logits = processor.finish_deferred_gather(output.next_token_logits)
        return None

    def _greedy_sample_from_vocab_parallel_head(self, *, hidden_states, lm_head, **kwargs):
        """As DFLASH's; from the draft head if there is one, on one CPU rank by its own kernel."""
        if self.draft_head is not None:
            return self.draft_head.greedy_tokens(hidden_states)
        shard = getattr(lm_head, "shard_indices", None)
        one_rank = hidden_states.is_cpu and get_parallel().tp_size == 1
        if one_rank and shard is not None and shard.num_added_elements == 0:
            return greedy_tokens(hidden_states, lm_head.weight[: shard.num_org_elements])
        return super()._greedy_sample_from_vocab_parallel_head(
            hidden_states=hidden_states, lm_head=lm_head, **kwargs
        )

    def _can_skip_verify_logits(self, batch, sampling_info) -> bool:
        if sampling_info is not None and hasattr(sampling_info, "dflare_penalise"):
            return False
        return super()._can_skip_verify_logits(batch, sampling_info)

    def _validate_phase1_sampling_support(self, batch) -> None:
        """Nothing to refuse: `_accept_block` samples on every device."""

    def _accept_block(self, *, next_token_logits, sampling_info, target_predict=None, **kwargs):
        """As DFLASH's; where SGLang's kernel cannot verify samples, sample the target here."""
        if (
            target_predict is None
            and not _is_all_greedy(sampling_info)
            and (
                not is_dflash_sampling_verify_available()
                or sampling_info.need_min_p_sampling
                or sampling_info.sampling_seed is not None
            )
        ):
            prefix_lens = kwargs["prefix_lens"]
            positions = (prefix_lens[:, None] + self._block_pos_offsets).reshape(-1)
            target_predict = sample_verify_positions(
                next_token_logits, sampling_info, positions, int(self.block_size)
            )
        return super()._accept_block(
            next_token_logits=next_token_logits,
            sampling_info=sampling_info,
            target_predict=target_predict,
            **kwargs,
        )

    def _accept_anchors(
        self,
        *,
        candidates: torch.Tensor,
        next_token_logits: torch.Tensor,
        sampling_info,
        draft_input,
        prefix_lens: torch.Tensor,
        target_predict: torch.Tensor | None,
    ) -> torch.Tensor:
        """`_accept_block` at width 1, where there is nothing to compare.

        Args:
            candidates: [bs, 1] the anchors.
            next_token_logits: [bs, V]; None where `target_predict` is known.
            prefix_lens: [bs] tokens before the anchors.
            target_predict: [bs] int64 argmax of the logits, or None if it is not known yet.

        Returns:
            The target's tokens, [bs] int64, the same on all ranks.
        """
        if target_predict is None and _is_all_greedy(sampling_info):
            target_predict = torch.argmax(next_token_logits, dim=-1)
        if target_predict is not None:
            self._tp_sync.sync(SpecTpSyncSite.DFLASH_ACCEPT_GREEDY, target_predict)
            return target_predict
        _, _, _, tokens, _ = self._accept_block(
            candidates=candidates,
            next_token_logits=next_token_logits,
            sampling_info=sampling_info,
            draft_input=draft_input,
            prefix_lens=prefix_lens,
            bs=len(prefix_lens),
        )
        return tokens.view(-1)


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
