"""How the speculative worker starts: pools, checks, graphs, and what steps of each arm cost."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.dp_attention import get_dp_tp_group
from sglang.srt.lora.layers import unwrap_lora_layer
from sglang.srt.runtime_context import (
    get_disagg,
    get_exec,
    get_parallel,
    get_schedule,
    get_spec,
)
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2

from dflare.adaptive import AdaptiveConfig, Arm
from dflare.engine.arms import Arms, measured_policy
from dflare.engine.context import ContextAppender
from dflare.engine.draft_head import DraftHeadSampler, drafted_tokens, make_draft_head
from dflare.engine.dummy_step import dummy_batch
from dflare.engine.hooks import check_hooks
from dflare.engine.lookups import Texts
from dflare.engine.penalties import Penalties
from dflare.engine.shared_taps import SharedTaps
from dflare.engine.step_timing import trace_steps
from dflare.engine.traffic import TrafficLog, traffic_folder
from dflare.engine.tree_step import TreeStep, why_no_trees
from dflare.engine.width_states import check_nothing_is_shared, tensors_of
from dflare.errors import UnsupportedError

logger = logging.getLogger(__name__)


class WorkerStart(DFlashWorkerV2):
    """A DFLASH worker that is ready for steps of any width; `DFlareWorker` is what runs them.

    Attributes:
        draft_head: rows of the target's head for the tokens that are drafted; None for all.
        traffic: keeps token ids of what is served; None where nobody asked for it.
        penalties: counts of penalised requests.
        context: writes the drafter's context.
        texts: finds what look-ups propose; None where nothing does.
        trees: runs steps that verify trees; None where there are none.
        arms: chooses the arm of each step.
    """

    # What a server is configured by and what chooses its arms; a test may have others.
    configure = staticmethod(lambda block_size: AdaptiveConfig.from_environment(block_size))
    make_policy = staticmethod(measured_policy)

    def __init__(self, *args, **kwargs) -> None:
        check_hooks()
        super().__init__(*args, **kwargs)
        # Before the size of the pools is chosen by what memory is left.
        self.draft_head = make_draft_head(self.draft_model, self._target_head())
        folder = traffic_folder() if get_parallel().tp_rank == 0 else None
        self.traffic = None
        if folder:
            vocab_size = self.draft_model.draft_config.vocab_size
            self.traffic = TrafficLog(folder, self.server_args.model_path, vocab_size)

    def _target_head(self) -> Any:
        return unwrap_lora_layer(self.target_worker.model_runner.model.lm_head)

    def renew_draft_head(self) -> None:
        """Take the tokens that the drafter's weights name now."""
        if self.draft_head is not None:
            self.draft_head.renew(self._target_head(), drafted_tokens(self.draft_model))

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
        self.penalties = Penalties(vocab_size, self.device)
        # Before the target's graphs are captured.
        self._taps = SharedTaps()
        self.model_runner.capture_tail_hooks.append(self._taps)
        if get_parallel().tp_rank == 0:
            self._log_once()

    def init_steps(self, decode: Callable[[Any, Arm], Any]) -> None:
        """Capture the block's graphs, then those of the other widths, and measure all steps.

        Args:
            decode: runs a decode step of an arm, which the worker is in.
        """
        others = list(self.draft_model_runner.capture_tail_hooks)
        DFlashWorkerV2.init_cuda_graphs(self)
        added = [h for h in self.draft_model_runner.capture_tail_hooks if h not in others]
        self.sampler_hook = added[0] if self._draft_sampler is not None else None
        config = self._configured()
        self.texts = self._texts_for(config)
        as_trees = config and (config.ragged or "tree" in config.proposers)
        self.trees = TreeStep(self, config) if config and as_trees else None
        self.context = ContextAppender(
            self.draft_model, self._k_pools, self._v_pools, at_once=self._pool_is_shared()
        )
        before = tensors_of(self)
        self.arms = Arms(
            self,
            group=get_dp_tp_group(),
            config=config,
            make_policy=self.make_policy,
            run=functools.partial(self._dummy_step, decode),
        )
        if not self.arms.adaptive:
            self.texts = None
        check_nothing_is_shared(before, self)
        # SGLang's account of what graphs take: shown in its log and its metrics.
        usage = self._additional_graph_memory_usage
        usage["target_verify"] = usage.get("target_verify", 0.0) + self.arms.graph_gb
        trace_steps(self)

    def _maybe_build_draft_sampler(self) -> Any:
        """What takes a draft's tokens in its graph; DFLASH knows when nothing can."""
        theirs, head = super()._maybe_build_draft_sampler(), self.draft_head
        if theirs is None:
            return None
        block, largest = int(self.block_size), max(get_exec().graph.cuda_graph_config.decode.bs)
        if head is not None:
            return DraftHeadSampler(head.weight, block_size=block, max_batch=largest, ids=head.ids)
        return DraftHeadSampler(
            theirs.weight[: theirs.num_org],
            block_size=block,
            max_batch=largest,
            first_id=theirs.org_vocab_start,
            group=theirs.tp_group,
        )

    def _configured(self) -> AdaptiveConfig | None:
        """The settings, without trees where they cannot be verified."""
        block = int(self.block_size)
        config = self.configure(block)
        if config is None or not {"tree", "lookup"} & set(config.proposers):
            return config
        # Two blocks of slots are reserved behind what the host knows of; with overlap scheduling a
        # step in flight may commit one of them.
        most = 2 * block if get_schedule().disable_overlap_schedule else block
        reason = why_no_trees(self)
        if reason is None and torch.device(self.device).type == "cpu":
            return config.sharing(block, most)
        if reason is None or "tree" not in config.proposers:
            trees = tuple(nodes for nodes in config.trees if nodes <= most)
            return config.model_copy(update={"trees": trees})
        if get_parallel().tp_rank == 0:
            logger.info("DFLARE: drafts are chains, not trees: %s", reason)
        others = tuple(who for who in config.proposers if who != "tree") or ("chain",)
        return config.model_copy(update={"proposers": others})

    def _texts_for(self, config: AdaptiveConfig | None) -> Texts | None:
        """The tokens of the pool's slots, if look-ups may propose."""
        if config is None or "lookup" not in config.proposers:
            return None
        return Texts(self.model_runner, prefixes=self._pool_is_shared())

    def _pool_is_shared(self) -> bool:
        """Whether the drafter's K/V are also copied between batches.

        HiCache copies those of a finished request to the host and, for another one, back;
        disaggregation receives those of a request that another server prefilled.
        """
        plan = self.hicache_draft_plan
        return bool(plan.device_pools) or get_disagg().disaggregation_mode != "null"

    def _dummy_step(self, decode: Callable[[Any, Arm], Any], requests: int, arm: Arm) -> None:
        """Run a step that serves nobody, append what it left, and wait for the device."""
        decode(dummy_batch(requests, self.model_runner), arm)
        self.context.flush()
        if torch.device(self.device).type != "cpu":
            torch.get_device_module(self.device).synchronize()
        # The scheduler would take these for the marks of a batch of its own, and let a prefill's
        # writes go ahead of the reads that they stand before.
        for runner in (self.model_runner, self.draft_model_runner):
            runner.shared_read_done_event = None

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


def _kv_bytes_per_token(pool) -> int:
    """Bytes that one token takes in all layers of a KV pool, on this rank."""
    size = pool.get_kv_size_bytes()
    return (sum(size) if isinstance(size, tuple) else size) // (pool.size + pool.page_size)
