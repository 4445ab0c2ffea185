"""The speculative worker: SGLang's DFLASH worker with DFlare's context and steps of any width."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from sglang.srt.managers.scheduler import GenerationBatchResult
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.dflash_utils import is_dflash_sampling_verify_available
from sglang.srt.speculative.dflash_worker_v2 import SIMULATE_ACC_LEN, _is_all_greedy
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dflare import ops
from dflare.adaptive import NO_LOOKUPS, PLAIN, Arm, LookupRule
from dflare.engine.lookups import Proposal
from dflare.engine.penalties import Penalised
from dflare.engine.sampling import (
    argmax,
    parts_of,
    requests_at_once,
    sample_verify_positions,
    seeds_of,
)
from dflare.engine.swapping import swapped
from dflare.engine.verify_step import step_slots, verify_candidates
from dflare.engine.worker_start import WorkerStart


class DFlareWorker(WorkerStart):
    """Prefill, a block's draft and verification, grammar, logprobs, windows and TP are DFLASH's.

    Ours are how target hidden states become the drafter's context K/V (`context`), which arm each
    step is (`arms`), look-ups (`texts`), the step that drafts nothing (`verify_step`), the one that
    verifies a tree (`trees`), penalties, and what SGLang's kernel for sampled verification does not
    know.
    """

    _splice: Callable[[torch.Tensor], None] | None = None  # of the step that runs

    def init_cuda_graphs(self) -> None:
        """SGLang's name for the last part of a start."""
        self.init_steps(lambda batch, arm: self._decode(batch, arm, *self._look_up(batch, arm)))

    def forward_batch_generation(
        self,
        batch: Any,
        on_publish: Any = None,
        grammar_barrier: Any = None,
        pp_proxy_tensors: Any = None,
    ) -> Any:
        """Run a prefill, or one decode step: choose an arm, then propose, verify, accept, append.

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
                self.arms.interrupt()
                self.context.flush()
                if penalised:
                    stack.enter_context(self.penalties.in_prefill(penalised, batch.sampling_info))
                if self.texts and prefill:
                    self.texts.write_prefixes(batch)
                result = super().forward_batch_generation(
                    batch, on_publish, grammar_barrier, pp_proxy_tensors
                )
                if penalised:
                    self.penalties.commit_prefill(penalised, result.next_token_ids)
                if self.texts and prefill:
                    self.texts.write_prefill(batch)
                return result
            if self.traffic:
                self.traffic.note(batch.reqs)
            arm, rule = self.arms.choose(batch.reqs)
            slots, look_up = self._look_up(batch, arm)
            if look_up and slots is not None and self.trees:
                self.trees.proposals.weigh(look_up, rule.odds)
                if arm.proposer == "lookup" and look_up.pays_nothing():
                    arm, slots = PLAIN, slots[:, :1].contiguous()
            self.context.flush([req.rid for req in batch.reqs] if arm.nodes == 1 else ())
            with self.arms.at(arm):
                return self._decode(
                    batch, arm, slots, look_up, rule, penalised, on_publish, grammar_barrier
                )

    def _look_up(self, batch: Any, arm: Arm) -> tuple[torch.Tensor | None, Proposal | None]:
        """Slots of what a step of an arm verifies, [bs, w], and what the text so far proposes."""
        if not self.texts and arm.proposer == "chain":  # a block's step alone finds its own
            return None, None
        most = self.trees.most(arm, batch) if self.trees else arm.nodes
        slots = step_slots(self.model_runner, batch, most)
        return slots, self.texts.look_up(batch, slots) if self.texts else None

    def _decode(
        self,
        batch: Any,
        arm: Arm,
        slots: torch.Tensor | None,
        proposal: Proposal | None,
        rule: LookupRule = NO_LOOKUPS,
        penalised: Penalised | None = None,
        on_publish: Any = None,
        grammar_barrier: Any = None,
    ) -> GenerationBatchResult:
        """One step of an arm: a block's of DFLASH, or one that verifies without a draft pass."""
        as_tree = self.trees is not None and self.trees.runs(arm)
        candidates = None if as_tree else _candidates(batch, arm, proposal)
        with ExitStack() as stack:
            if penalised:
                verified = lambda: self._verified(as_tree, candidates)  # noqa: E731
                stack.enter_context(
                    self.penalties.in_verification(penalised, batch.sampling_info, verified)
                )
            if as_tree:
                assert self.trees and slots is not None
                result = self.trees.run(batch, arm, slots, proposal, on_publish, grammar_barrier)
            elif candidates is None:
                stack.enter_context(self._splicing(proposal, rule.splice))
                result = super().forward_batch_generation(batch, on_publish, grammar_barrier)
            else:
                assert slots is not None
                result = verify_candidates(
                    self, batch, candidates, slots, on_publish, grammar_barrier
                )
        tokens = result.next_token_ids.view(-1, result.speculative_num_draft_tokens)
        if penalised:
            self.penalties.commit(penalised, tokens, result.accept_lens)
        if self.texts and proposal:
            self.texts.write_committed(proposal, tokens)
            if batch.reqs:  # none of them sent what start-up measures
                right = proposal.right(tokens, result.accept_lens)
                if self.trees and (as_tree or proposal.worth is not None):
                    self.trees.proposals.learn(proposal, right[0], result.accept_lens)
                self.arms.compare(proposal, right)
        if batch.reqs:
            tree = self.trees.tree if as_tree and self.trees else None
            self.arms.verifies(tree.verified if tree else tokens.numel())
        return result

    def _verified(
        self, as_tree: bool, candidates: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens that the running step verifies, once they are drafted, and a tree's parents."""
        if as_tree:
            assert self.trees
            # Rows that a request does not have count for nothing, but must be tokens.
            return self.trees.tree.tokens.clamp(min=0), self.trees.tree.parents
        # DFLASH makes its block in the step.
        return self._draft_block_tokens_buf if candidates is None else candidates, None

    @contextmanager
    def _splicing(self, proposal: Proposal | None, least_strength: int) -> Iterator[None]:
        """Let a look-up replace drafted tokens before they are verified."""
        if proposal is None:
            yield
            return
        splice = lambda drafts: proposal.splice(  # noqa: E731
            drafts.view(-1, self.block_size - 1), least_strength
        )
        runner, forward = self.draft_model_runner, self.draft_model_runner.forward

        def forward_and_splice(forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
            output = forward(forward_batch, *args, **kwargs)
            if self._draft_sampler is not None and output.can_run_graph:
                # Where the draft's graph leaves its tokens.
                splice(self._draft_sampler.out[: len(proposal.match) * (self.block_size - 1)])
            return output

        with swapped(runner, forward=forward_and_splice), swapped(self, _splice=splice):
            yield

    def on_verify_complete_cpu(
        self, num_correct_drafts_per_req: Sequence[int], batch_size: int = 0
    ) -> None:
        """SGLang's hook: the result of the oldest step in flight is on the host."""
        self.arms.complete([n + 1 for n in num_correct_drafts_per_req])

    def note_request_finished(self, *, rid: str, natural_stop: bool) -> None:
        """SGLang's hook: a request ended."""
        self.arms.finish(rid)
        if self.traffic:
            self.traffic.finish(rid)

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

    def _greedy_sample_from_vocab_parallel_head(self, *, hidden_states, lm_head, **kwargs):
        """As DFLASH's; from the draft head if there is one, on one CPU rank by its own kernel."""
        shard = getattr(lm_head, "shard_indices", None)
        one_rank = hidden_states.is_cpu and get_parallel().tp_size == 1
        if self.draft_head is not None:
            tokens = self.draft_head.greedy_tokens(hidden_states)
        elif one_rank and shard is not None and shard.num_added_elements == 0:
            head = lm_head.weight[: shard.num_org_elements]
            tokens = torch.empty(len(hidden_states), dtype=torch.int64)
            ops.head_argmax(hidden_states.to(head.dtype), head, tokens)
        else:
            tokens = super()._greedy_sample_from_vocab_parallel_head(
                hidden_states=hidden_states, lm_head=lm_head, **kwargs
            )
        if self._splice:
            self._splice(tokens)
        return tokens

    def _can_skip_verify_logits(self, batch, sampling_info) -> bool:
        if sampling_info is not None and hasattr(sampling_info, "dflare_penalise"):
            return False
        return super()._can_skip_verify_logits(batch, sampling_info)

    def _validate_phase1_sampling_support(self, batch) -> None:
        """Nothing to refuse: `_accept_block` samples on every device."""

    def _prewarm_batch_size(self, block_size: int) -> int:
        """Of SGLang's rehearsal of its sampling kernel: as many requests as it is ever given."""
        at_once = requests_at_once(block_size, self.model_config.vocab_size)
        return min(super()._prewarm_batch_size(block_size), at_once)

    def _accept_block(
        self,
        *,
        candidates,
        next_token_logits,
        sampling_info,
        prefix_lens,
        bs,
        target_predict=None,
        **kwargs,
    ):
        """As DFLASH's; where SGLang's kernel cannot verify samples, sample the target here."""
        accept = super()._accept_block
        width = int(self.block_size)
        sampled = target_predict is None and not _is_all_greedy(sampling_info)
        if sampled and (
            not is_dflash_sampling_verify_available()
            or sampling_info.need_min_p_sampling
            or sampling_info.sampling_seed is not None
        ):
            positions = (prefix_lens[:, None] + self._block_pos_offsets).reshape(-1)
            target_predict = sample_verify_positions(
                next_token_logits, sampling_info, positions, width
            )
        if target_predict is None and candidates.is_cpu:
            target_predict = argmax(next_token_logits)
        if width == 1 and candidates.is_cpu and SIMULATE_ACC_LEN <= 0:
            # Nothing was proposed: what DFLASH finds out by ten operators.
            tokens = target_predict.view(-1, 1)
            self._tp_sync.sync(SpecTpSyncSite.DFLASH_ACCEPT_GREEDY, tokens)
            accept_lens = torch.zeros(bs, dtype=torch.int32)
            return accept_lens, accept_lens + 1, tokens.flatten(), tokens, prefix_lens + 1
        parts = []
        if sampled and target_predict is None:
            parts = parts_of(sampling_info, bs, width, next_token_logits.shape[1])
        if len(parts) < 2:
            return accept(
                candidates=candidates,
                next_token_logits=next_token_logits,
                sampling_info=sampling_info,
                prefix_lens=prefix_lens,
                bs=bs,
                target_predict=target_predict,
                **kwargs,
            )
        accepted = []
        for part, info in parts:
            accept_lens, *others = accept(
                candidates=candidates[part],
                next_token_logits=next_token_logits[part.start * width : part.stop * width],
                sampling_info=info,
                prefix_lens=prefix_lens[part],
                bs=part.stop - part.start,
                **kwargs,
            )
            # SGLang's kernel writes the next part's into the same buffer.
            accepted.append((accept_lens.clone(), *others[:-1]))
        return *(torch.cat(x) for x in zip(*accepted, strict=True)), None


def _candidates(batch: Any, arm: Arm, proposal: Proposal | None) -> torch.Tensor | None:
    """What a step without a draft pass verifies, [bs, nodes]; None where the drafter proposes."""
    if arm.proposer in ("chain", "tree"):
        return None
    anchors = batch.spec_info.bonus_tokens.view(-1, 1)
    if proposal is None or arm.nodes == 1:
        return anchors
    return torch.cat((anchors, proposal.found[:, : arm.nodes - 1]), dim=1)
