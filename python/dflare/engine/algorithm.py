"""The algorithm object: answers SGLang's questions as DFLASH does and settles the arguments."""

import logging

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from dflare.adaptive import AdaptiveConfig
from dflare.engine.names import ALGORITHM, ATTENTION_BACKEND
from dflare.errors import DFlareError

logger = logging.getLogger(__name__)


class DFlareAlgorithm(CustomSpecAlgo):
    """DFLARE as SGLang's scheduler and model runner see it: a member of the DFLASH family.

    Every branch that asks "is this DFLASH?" must take the DFLASH path, because the worker is a
    subclass of `DFlashWorkerV2` (sglang/srt/speculative/spec_info.py lists the questions).
    """

    def is_dflash(self) -> bool:
        return True

    def is_dflash_family(self) -> bool:
        return True

    def supports_target_verify_for_draft(self) -> bool:
        return True

    def supports_mixed_chunk(self) -> bool:
        return True

    def supports_prefill_shared_read_done(self) -> bool:
        return True

    def supports_grammar_overlap(self) -> bool:
        return True

    # The next two are not part of the check at registration, but the scheduler calls them.
    def carries_draft_hidden_states(self) -> bool:
        return False

    def need_topk(self) -> bool:
        return False

    def create_future_map(self, *args, **kwargs):
        return SpeculativeAlgorithm.create_future_map(self, *args, **kwargs)  # type: ignore[arg-type]

    def build_disagg_draft_input(self, batch, last_tokens_tensor, future_map):
        return SpeculativeAlgorithm.build_disagg_draft_input(
            self,  # type: ignore[arg-type]
            batch,
            last_tokens_tensor,
            future_map,
        )

    def handle_server_args(self, server_args) -> None:
        """Validate the pair, choose block size and draft backend, then let DFLASH settle the rest.

        Raises:
            ValueError: anything wrong with the drafter, the pair or the flags, in one line.
        """
        from sglang.srt.arg_groups.speculative_hook import _handle_dflash

        from dflare.engine.pair import check_server_pair
        from dflare.engine.traffic import traffic_folder

        try:
            draft = check_server_pair(server_args)
            AdaptiveConfig.from_environment(
                server_args.speculative_num_draft_tokens
                or server_args.speculative_dflash_block_size
                or draft.block_size
            )
            traffic_folder()
        except DFlareError as error:
            # SGLang prints a ValueError from argument handling; a foreign type it would wrap.
            raise ValueError(f"DFLARE: {error}") from error
        if server_args.speculative_num_draft_tokens is None and (
            server_args.speculative_dflash_block_size is None
        ):
            server_args.speculative_num_draft_tokens = draft.block_size
        if server_args.speculative_draft_attention_backend is None:
            server_args.speculative_draft_attention_backend = ATTENTION_BACKEND
        if server_args.speculative_draft_kv_cache_dtype is None:
            # Not the target's --kv-cache-dtype: our kernels read K/V in the drafter's own dtype.
            server_args.speculative_draft_kv_cache_dtype = "auto"
        if server_args.speculative_draft_window_size is not None:
            logger.info(
                "DFLARE: the drafter sees the last %d tokens (--speculative-draft-window-size); "
                "a warning that this has no effect knows SGLang's own algorithms only",
                server_args.speculative_draft_window_size,
            )
        if server_args.min_free_slots_delay is None and server_args.pp_size == 1:
            # DFLASH holds requests back until several slots are free, because every admission costs
            # it a prefill of the drafter; ours is one operator, and the wait was 20 steps.
            server_args.min_free_slots_delay = 1
        _handle_dflash(server_args)


def register_algorithm() -> None:
    """Register `DFLARE`; worker and draft model are imported only where they are built."""

    @SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=True, spec_class=DFlareAlgorithm)
    def _worker_class(_server_args):
        from sglang.srt.models.registry import ModelRegistry

        from dflare.engine.hooks import apply_scheduler_hooks
        from dflare.engine.worker import DFlareWorker

        apply_scheduler_hooks()

        ModelRegistry.register("dflare.engine.models", overwrite=True, strict=True)
        return DFlareWorker
