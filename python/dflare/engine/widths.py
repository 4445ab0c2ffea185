"""Decode steps whose width is chosen anew each time by `dflare.adaptive`.

A step of width w drafts w - 1 tokens a request and verifies them with the anchor; width 1 drafts
nothing, and the verified token's hidden states still become the drafter's context.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.layers.dp_attention import get_dp_tp_group
from sglang.srt.runtime_context import (
    get_disagg,
    get_exec,
    get_observability,
    get_parallel,
    get_serving,
)

from dflare.adaptive import (
    AdaptiveConfig,
    CostTable,
    SpecMetrics,
    WidthController,
    WidthPolicy,
    measure_steps,
)
from dflare.engine.deferred_context import DeferredContext
from dflare.engine.dummy_step import dummy_step
from dflare.engine.plain_step import plain_step
from dflare.engine.step_timing import save_start_up_times
from dflare.engine.width_states import WidthStates

logger = logging.getLogger(__name__)

_MEASURED_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MEASURE_SECONDS = 20.0


class AdaptiveWidths:
    """Mixin of the speculative worker; it goes before `DFlashWorkerV2`.

    Rank 0 of the tensor-parallel group decides for all: step times differ between ranks. The
    decision needs what the host knows already, so it waits for no device.
    """

    block_size: int
    model_runner: Any
    hicache_draft_plan: Any
    _append_target_hidden_to_draft_kv_by_loc: Any

    def init_cuda_graphs(self) -> None:
        """Capture the block's graphs, then those of the other widths, and measure all steps."""
        super().init_cuda_graphs()  # type: ignore[misc]
        self._width_group = get_dp_tp_group()
        config = AdaptiveConfig.from_environment(int(self.block_size))
        reason = _why_not_adaptive() if config else None
        if reason:
            logger.warning("every step verifies the whole block: adaptive widths and %s", reason)
            config = None
        self._adaptive = config is not None
        self.deferred_context = DeferredContext(
            self._append_target_hidden_to_draft_kv_by_loc, at_once=self._pool_is_shared()
        )
        self._width_states = WidthStates(self, config.widths if config else ())
        policy = WidthPolicy(config, self._measure_costs(config.widths)) if config else None
        self._controller: WidthController | None = None
        if self._width_group.rank_in_group == 0:
            labels = _metric_labels() if get_observability().enable_metrics else None
            metrics = SpecMetrics(labels, lambda line: logger.warning("DFLARE: %s", line))
            self._controller = WidthController(int(self.block_size), policy, metrics)

    def forward_batch_generation(
        self,
        batch: Any,
        on_publish: Any = None,
        grammar_barrier: Any = None,
        pp_proxy_tensors: Any = None,
    ) -> Any:
        """Run a prefill as ever, and a decode step at the width chosen for it."""
        step = super().forward_batch_generation  # type: ignore[misc]
        more = on_publish, grammar_barrier, pp_proxy_tensors
        mode = batch.forward_mode
        if mode.is_extend() or batch.is_extend_in_batch or mode.is_idle():
            if self._controller:
                self._controller.interrupt()
            self.deferred_context.flush()
            return step(batch, *more)
        width, requests = 0, [req.rid for req in batch.reqs]
        if self._controller:
            width = self._controller.begin(
                requests,
                [req.sampling_params.max_new_tokens - len(req.output_ids) for req in batch.reqs],
            )
        if not self._adaptive:
            return step(batch, *more)
        width = self._from_rank_0(width)
        self.deferred_context.flush(requests if width == 1 else ())
        with self._width_states.at(width):
            if width == 1:
                return plain_step(self, batch, on_publish, grammar_barrier)
            return step(batch, *more)

    def on_verify_complete_cpu(
        self, num_correct_drafts_per_req: Sequence[int], batch_size: int = 0
    ) -> None:
        """SGLang's hook: the result of the oldest step in flight is on the host."""
        if self._controller:
            _log(self._controller.complete([n + 1 for n in num_correct_drafts_per_req]))

    def note_request_finished(self, *, rid: str, natural_stop: bool) -> None:
        """SGLang's hook: a request ended."""
        if self._controller:
            _log(self._controller.finish(rid))

    def _pool_is_shared(self) -> bool:
        """Whether the drafter's K/V are also copied between batches.

        HiCache copies those of a finished request to the host and, for another one, back;
        disaggregation receives those of a request that another server prefilled.
        """
        plan = self.hicache_draft_plan
        return bool(plan.device_pools) or get_disagg().disaggregation_mode != "null"

    def _measure_costs(self, widths: Sequence[int]) -> CostTable:
        def run(batch: int, width: int) -> None:
            with self._width_states.at(width):
                dummy_step(self, batch)

        measured = measure_steps(run, self._batches_to_measure(), widths)
        table = CostTable(widths, measured, int(self.model_runner.max_running_requests))
        if self._width_group.rank_in_group == 0:
            logger.info("DFLARE: step time in ms by width, %s", table.describe())
            save_start_up_times(measured)
        return table

    def _batches_to_measure(self) -> Iterator[int]:
        """Batch sizes while there is time; the next takes about twice as long as the last."""
        start = time.perf_counter()
        largest = int(self.model_runner.max_running_requests)
        for batch in _MEASURED_BATCHES:
            in_time = 3 * (time.perf_counter() - start) < _MEASURE_SECONDS
            if batch > largest or not self._from_rank_0(int(in_time)):
                return
            yield batch

    def _from_rank_0(self, value: int) -> int:
        """What rank 0 says, over the CPU group: the device is not involved."""
        group = self._width_group
        if group.world_size == 1:
            return value
        word = torch.tensor([value])
        torch.distributed.broadcast(word, src=group.ranks[0], group=group.cpu_group)
        return int(word)


def _why_not_adaptive() -> str | None:
    """What keeps the ranks or the backends from changing their width between steps."""
    parallel = get_parallel()
    if parallel.attn_dp_enabled:
        return "DP attention do not go together (its replicas would have to agree at every step)"
    if parallel.pp_size > 1:
        return "pipeline parallelism do not go together"
    if get_exec().overlap.enable_two_batch_overlap or get_disagg().enable_pdmux:
        return "two-batch overlap or PD multiplexing do not go together"
    return None


def _log(line: str | None) -> None:
    if line:
        logger.info("DFLARE: %s", line)


def _metric_labels() -> dict[str, str]:
    """The labels by which SGLang's own metrics tell servers and ranks apart.

    As `SchedulerMetricsCollector.init_new` (sglang/srt/observability/metrics_collector.py) has
    them, less those for expert parallelism and priorities, which DFLARE does not count apart.
    """
    parallel, disagg = get_parallel(), get_disagg()
    if disagg.enable_pd_role_switch:
        engine_type = "dynamic"
    else:
        engine_type = DisaggregationMode.to_engine_type(disagg.disaggregation_mode)
    labels = {
        "model_name": get_serving().served_model_name,
        "engine_type": engine_type,
        "tp_rank": parallel.tp_rank,
        "pp_rank": parallel.pp_rank,
    }
    if parallel.dp_rank is not None:
        labels["dp_rank"] = parallel.dp_rank
    labels |= get_observability().extra_metric_labels or {}
    return {name: str(value) for name, value in labels.items()}
