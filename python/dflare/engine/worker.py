"""The speculative worker: SGLang's DFLASH worker with DFlare's context K/V."""

import logging
from contextlib import ExitStack

import torch
from sglang.srt.runtime_context import get_parallel, get_spec
from sglang.srt.speculative.dflash_utils import is_dflash_sampling_verify_available
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2, _is_all_greedy
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dflare import ops
from dflare.engine.cpu_layers import greedy_tokens
from dflare.engine.hooks import check_hooks
from dflare.engine.penalties import Penalties
from dflare.engine.sampling import sample_verify_positions, seeds_of
from dflare.engine.step_timing import trace_steps
from dflare.engine.swapping import swapped
from dflare.engine.widths import AdaptiveWidths
from dflare.errors import UnsupportedError

logger = logging.getLogger(__name__)


class DFlareWorker(AdaptiveWidths, DFlashWorkerV2):
    """Scheduling, verification, sampling, grammar, logprobs, windows and TP are DFLASH's.

    Ours are how target hidden states become the drafter's context K/V, and sampled verification
    on devices where SGLang has no kernel for it.
    """

    def __init__(self, *args, **kwargs) -> None:
        check_hooks()
        super().__init__(*args, **kwargs)

    def alloc_memory_pool(self, *args, **kwargs) -> None:
        """Allocate the drafter's pool and keep its per-layer K and V buffers at hand."""
        super().alloc_memory_pool(*args, **kwargs)
        pool = self.draft_model_runner.token_to_kv_pool
        layers = self.draft_model.layers
        buffers = [pool.get_kv_buffer(layer.self_attn.attn.layer_id) for layer in layers]
        self._k_pools = [k for k, _ in buffers]
        self._v_pools = [v for _, v in buffers]
        self._check_cache()
        vocab_size = self.model_runner.model_config.vocab_size
        self._penalties = Penalties(vocab_size, self.device)
        trace_steps(self)
        if get_parallel().tp_rank == 0:
            self._log_once()

    def _check_cache(self) -> None:
        """Refuse a K/V cache that the operators would refuse at the first request.

        Raises:
            UnsupportedError: it has another dtype than the drafter.
        """
        pool, dtype = self._k_pools[0], self.draft_model.context_kv_proj.dtype
        if pool.dtype != dtype:
            raise UnsupportedError(
                f"the drafter's K/V cache is {pool.dtype} and its weights are {dtype}; DFLARE "
                "keeps both in one dtype: serve without --speculative-draft-kv-cache-dtype"
            )

    def _log_once(self) -> None:
        draft = self.draft_model.draft_config
        target_bytes, draft_bytes = (
            _kv_bytes_per_token(runner.token_to_kv_pool)
            for runner in (self.model_runner, self.draft_model_runner)
        )
        logger.info(
            "DFLARE: drafter of %d layers, taps %s, block %d; K/V %d (target) + %d (drafter) "
            "bytes a token; draft attention backend %s",
            draft.num_hidden_layers,
            ", ".join(map(str, draft.target_layer_ids)),
            self.block_size,
            target_bytes,
            draft_bytes,
            get_spec().speculative_draft_attention_backend,
        )
        if note := draft.sliding_note():
            logger.warning("DFLARE: %s", note)

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
        """Write the drafter's context K/V of target tokens into their slots, all layers at once.

        Args:
            target_hidden: [N, T * H] tapped states, one row a token; rows beyond
                `cache_loc.numel()` are padding.
            cache_loc: [N] slots; positions: [N] absolute positions.
            cache_loc_2d, commit_lens: after a verify, [bs, B] slots and [bs] committed lengths;
                only the first `commit_lens[b]` rows of block b are written.
            extend_lens: unused, DFLASH's signature.
        """
        tokens = cache_loc.numel()
        if tokens == 0:
            return
        model = self.draft_model
        rotary = model.layers[0].self_attn.rotary_emb
        with torch.inference_mode():
            ops.append_context_kv(
                target_hidden[:tokens].to(model.context_kv_proj.dtype),
                model.fusion_probs,
                model.hidden_norm.weight,
                model.hidden_norm.variance_epsilon,
                model.context_kv_proj,
                model.context_kv_bias,
                model.k_norm_weights,
                model.hidden_norm.variance_epsilon,
                rotary.cos_sin_cache,
                positions.long(),
                cache_loc.long(),
                None if commit_lens is None else commit_lens.int(),
                block_size=1 if cache_loc_2d is None else cache_loc_2d.shape[1],
                k_pools=self._k_pools,
                v_pools=self._v_pools,
            )

    def _greedy_sample_from_vocab_parallel_head(self, *, hidden_states, lm_head, **kwargs):
        """As DFLASH's; on one CPU rank with the head's own kernel."""
        shard = getattr(lm_head, "shard_indices", None)
        one_rank = hidden_states.is_cpu and get_parallel().tp_size == 1
        if one_rank and shard is not None and shard.num_added_elements == 0:
            return greedy_tokens(hidden_states, lm_head.weight[: shard.num_org_elements])
        return super()._greedy_sample_from_vocab_parallel_head(
            hidden_states=hidden_states, lm_head=lm_head, **kwargs
        )

    def forward_batch_generation(self, batch, *args, **kwargs):
        """As DFLASH's, with the requests' seeds and penalties."""
        with ExitStack() as stack:
            seeds = seeds_of(batch)
            if seeds is not None:
                stack.enter_context(swapped(batch.sampling_info, sampling_seed=seeds))
            penalised = self._penalties.select(batch)
            if penalised is None:
                return super().forward_batch_generation(batch, *args, **kwargs)
            if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
                with self._penalties.in_prefill(penalised, batch.sampling_info):
                    result = super().forward_batch_generation(batch, *args, **kwargs)
                self._penalties.commit_prefill(penalised, result.next_token_ids)
                return result
            stack.enter_context(
                self._penalties.in_verification(
                    penalised, batch.sampling_info, lambda: self._draft_block_tokens_buf
                )
            )
            result = super().forward_batch_generation(batch, *args, **kwargs)
            tokens = result.next_token_ids.view(-1, result.speculative_num_draft_tokens)
            self._penalties.commit(penalised, tokens, result.accept_lens)
            return result

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


def _kv_bytes_per_token(pool) -> int:
    """Bytes that one token takes in all layers of a KV pool, on this rank."""
    size = pool.get_kv_size_bytes()
    return (sum(size) if isinstance(size, tuple) else size) // (pool.size + pool.page_size)
