"""Which arm each decode step is: chosen anew by `dflare.adaptive`, agreed on by all ranks.

An arm says who proposes and how many tokens of a request are verified, the anchor and what is
proposed; whoever proposes, the verified tokens' hidden states become the drafter's context.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import (
    get_disagg,
    get_exec,
    get_observability,
    get_parallel,
    get_serving,
)

from dflare.adaptive import (
    NO_LOOKUPS,
    AdaptiveConfig,
    Arm,
    ArmController,
    ArmPolicy,
    CostTable,
    LookupRule,
    SpecMetrics,
    Standing,
    chain,
    measure_steps,
)
from dflare.engine.lookups import Proposal
from dflare.engine.step_timing import save_start_up_times
from dflare.engine.width_states import WidthStates

logger = logging.getLogger(__name__)

_MEASURED_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MEASURE_SECONDS = 20.0

# Gives the policy for a configuration; called once, with a function that measures steps of all
# arms: it takes a while.
PolicyFactory = Callable[[AdaptiveConfig, Callable[[], CostTable]], ArmPolicy]


def measured_policy(config: AdaptiveConfig, measure: Callable[[], CostTable]) -> ArmPolicy:
    """The policy that servers use: it starts from what steps cost on this machine."""
    return ArmPolicy(config, measure())


class Agreement:
    """Arms that rank 0 of a group chooses: step times differ between ranks.

    The other ranks are told when a decision is made and not at every step: how long it stands is
    part of it, and what ends it earlier (other requests, or fewer tokens left than its nodes) every
    rank sees for itself. Nothing waits for a device.
    """

    def __init__(self, group: Any, arms: Sequence[Arm] = ()) -> None:
        """
        Args:
            group: SGLang's `GroupCoordinator`.
            arms: those to choose from, the same on all ranks.
        """
        self._group = group
        self._arms = list(arms)
        self._choice: tuple[Arm, LookupRule] | None = None
        self._standing = Standing()

    @property
    def is_leader(self) -> bool:
        """Whether this rank chooses."""
        return self._group.rank_in_group == 0

    def settle(
        self,
        requests: Sequence[str],
        remaining: Sequence[int],
        choice: tuple[Arm, LookupRule, int] | None,
    ) -> tuple[Arm, LookupRule]:
        """Return the arm of the next step and its look-ups' rule, the same on all ranks.

        Args:
            requests: ids of the batch.
            remaining: tokens that each may still produce.
            choice: on rank 0 the arm, the rule, and for how many steps both were decided, this one
                included.
        """
        if self._group.world_size == 1:
            assert choice
            return choice[:2]
        ids = tuple(requests)
        if self._choice is None or not self._standing.goes_on(ids, remaining):
            arm, rule, standing = choice or (self._arms[0], NO_LOOKUPS, 0)
            words = self.from_leader(self._arms.index(arm), standing, *rule)
            index, steps = words[:2]
            self._choice = self._arms[index], LookupRule(*words[2:])
            self._standing.begin(ids, self._arms[index].nodes, steps)
        return self._choice

    def from_leader(self, *values: int) -> list[int]:
        """What rank 0 says, over the CPU group."""
        if self._group.world_size == 1:
            return list(values)
        words = torch.tensor(values)
        torch.distributed.broadcast(words, src=self._group.ranks[0], group=self._group.cpu_group)
        return words.tolist()


class Arms:
    """Chooses the arm of each step, puts the worker into its width, learns what came of it."""

    def __init__(
        self,
        worker: Any,
        *,
        group: Any,
        config: AdaptiveConfig | None,
        make_policy: PolicyFactory,
        run: Callable[[int, Arm], None],
    ) -> None:
        """Build what other widths than the block need, and measure steps of all arms.

        Args:
            worker: a `DFlareWorker` whose attention backends and graphs of the block are ready.
            group: the ranks that must agree, a `GroupCoordinator`.
            config: the settings; None for steps of the whole block only.
            make_policy: called on rank 0 of the group and, to measure with it, on all others.
            run: runs a dummy step of (requests, arm) in the worker, which is at that width, and
                waits for it.
        """
        self._block = int(worker.block_size)
        self._largest = int(worker.model_runner.max_running_requests)
        self._run = run
        reason = _why_not_adaptive() if config else None
        if reason:
            logger.warning("every step verifies the whole block: adaptive arms and %s", reason)
            config = None
        self._states = WidthStates(worker, config.widths if config else (), _tree_sizes(config))
        if config and len(self._states.widths) < 2:
            config = None
        if config:
            trees = tuple(nodes for nodes in config.trees if nodes in self._states.trees)
            config = config.model_copy(update={"widths": self._states.widths, "trees": trees})
        self._config = config
        arms = config.arms if config else (chain(self._block),)
        self._agreement = Agreement(group, arms)
        policy = make_policy(config, lambda: self._measure(arms)) if config else None
        self.adaptive = config is not None
        self._controller: ArmController | None = None
        if self._agreement.is_leader:
            labels = _metric_labels() if get_observability().enable_metrics else None
            metrics = SpecMetrics(labels, lambda line: logger.warning("DFLARE: %s", line))
            self._controller = ArmController(self._block, policy, metrics)

    @property
    def graph_gb(self) -> float:
        """Device memory that the graphs of the other widths take."""
        return self._states.graph_gb

    def choose(self, reqs: Sequence[Any]) -> tuple[Arm, LookupRule]:
        """Choose the decode step that is about to be launched.

        Args:
            reqs: the batch's requests, SGLang's `Req`.

        Returns:
            Its arm, and which look-ups it verifies.
        """
        ids = [req.rid for req in reqs]
        left = [req.sampling_params.max_new_tokens - len(req.output_ids) for req in reqs]
        choice = self._controller.begin(ids, left) if self._controller else None
        if not self.adaptive:
            return chain(self._block), NO_LOOKUPS
        return self._agreement.settle(ids, left, choice)

    def at(self, arm: Arm) -> AbstractContextManager[None]:
        """Run the worker as an arm needs it."""
        as_tree = self._config is not None and self._config.as_tree(arm)
        return self._states.at(arm.nodes, tree=as_tree)

    def interrupt(self) -> None:
        """A prefill runs, or nothing."""
        if self._controller:
            self._controller.interrupt()

    def verifies(self, tokens: int) -> None:
        """Say how many tokens of all requests the step just launched verifies."""
        if self._controller:
            self._controller.verifies(tokens)

    def compare(self, proposal: Proposal, right: torch.Tensor) -> None:
        """Let the policy learn what a look-up was worth in the step just launched.

        Args:
            right: from `Proposal.right`.
        """
        if self._controller:  # of the rank that learns
            self._controller.compare(proposal.compare(right))

    def complete(self, commit_lens: Sequence[int]) -> None:
        """The result of the oldest step in flight is on the host: committed tokens a request."""
        if self._controller:
            _log(self._controller.complete(commit_lens))

    def finish(self, request_id: str) -> None:
        """A request ended."""
        if self._controller:
            _log(self._controller.finish(request_id))

    def _measure(self, arms: Sequence[Arm]) -> CostTable:
        def run(requests: int, arm: Arm) -> None:
            with self.at(arm):
                self._run(requests, arm)

        measured = measure_steps(run, self._batches_to_measure(), _worth_measuring(arms))
        table = CostTable(arms, measured, self._largest)
        if self._agreement.is_leader:
            logger.info("DFLARE: step time in ms by arm, %s", table.describe())
            save_start_up_times(measured)
        return table

    def _batches_to_measure(self) -> Iterator[int]:
        """Batch sizes while there is time; the next takes about twice as long as the last."""
        start = time.perf_counter()
        for batch in _MEASURED_BATCHES:
            in_time = 3 * (time.perf_counter() - start) < _MEASURE_SECONDS
            (go_on,) = self._agreement.from_leader(int(in_time))
            if batch > self._largest or not go_on:
                return
            yield batch


def _tree_sizes(config: AdaptiveConfig | None) -> tuple[int, ...]:
    """Nodes of the steps that are run as those of trees."""
    if config is None:
        return ()
    return tuple(sorted({arm.nodes for arm in config.arms if config.as_tree(arm)}))


def _worth_measuring(arms: Sequence[Arm]) -> list[Arm]:
    """Arms that are measured at start-up: what others of their proposer take lies between.

    Of many sizes the first, the last and one in the middle: a start should not take long.
    """
    measured: list[Arm] = []
    for proposer in dict.fromkeys(arm.proposer for arm in arms):
        own = [arm for arm in arms if arm.proposer == proposer]
        kept = {0, len(own) // 2, len(own) - 1} if len(own) > 4 else range(len(own))
        measured += [arm for i, arm in enumerate(own) if i in kept]
    return measured


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
