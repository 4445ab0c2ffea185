"""What changing the width relies on inside SGLang 0.5.23: a version that moved it fails here."""

import inspect
import re
from types import SimpleNamespace

import pytest
from sglang.srt.layers import logprob_processor
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components import batch_result_processor
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.observability.metrics_collector import SchedulerMetricsCollector
from sglang.srt.speculative import dflash_utils, dflash_worker_v2, spec_utils
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker, HiCacheDraftPlan
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.spec_sampling_mask import SpeculativeSamplingMaskCapture

from dflare.engine import arms, width_states

WORKER = inspect.getsource(dflash_worker_v2.DFlashWorkerV2)


def test_every_tensor_of_the_worker_that_is_sized_by_the_block_is_swapped():
    """A buffer that a new SGLang adds beside them would be shared by all widths unnoticed."""
    grown = re.findall(
        r"self\.(\w+) = (?:torch\.empty|\[)",
        inspect.getsource(dflash_worker_v2.DFlashWorkerV2._ensure_draft_block_buffers)
        + inspect.getsource(dflash_worker_v2.DFlashWorkerV2._ensure_accept_bonus_buffers),
    )
    swapped = {*width_states._DRAFT_BUFFERS, *width_states._ACCEPT_BUFFER_PAIRS, "_accept_len_buf"}
    assert set(grown) == swapped


@pytest.mark.parametrize(
    "name",
    [
        *("block_size", "speculative_num_draft_tokens", "_block_pos_offsets", "_draft_sampler"),
        *("_draft_block_spec_info", "_accept_bonus_buffer_cap", "_target_logits_processor"),
        *("_need_mamba_verify_commit", "draft_parallel_layout", "_tp_sync"),
    ],
)
def test_the_worker_has_the_attribute(name):
    assert re.search(rf"self\.{name}\b(: [\w\[\], .]+)? = ", WORKER)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (DecodeCudaGraphRunner.__init__, "attn_backend speculative_num_draft_tokens"),
        (ModelRunner._get_attention_backend, "init_new_workspace"),
        (BaseSpecWorker.on_verify_complete_cpu, "num_correct_drafts_per_req batch_size"),
        (BaseSpecWorker.note_request_finished, "rid natural_stop"),
        (LogitsProcessor.deferred_argmax, "logits"),
        (LogitsProcessor.finish_deferred_gather, "logits"),
        (DFlashVerifyInput.prepare_for_verify, "batch target_worker"),
        (logprob_processor.compute_spec_logprobs, "batch logits_output predict chain_stride"),
        (spec_utils.build_grammar_vocab_mask, "reqs tree sampling_info device barrier"),
        (SpeculativeSamplingMaskCapture.from_logits, "next_token_logits draft_input bs"),
        (
            dflash_worker_v2.DFlashWorkerV2.forward_batch_generation,
            "batch on_publish grammar_barrier pp_proxy_tensors",
        ),
        (
            dflash_utils.apply_dflash_verify_logits_adjustments,
            "next_token_logits sampling_info draft_token_num",
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_the_function_takes_the_parameters(function, parameters):
    assert set(parameters.split()) <= set(inspect.signature(function).parameters)


def test_a_graph_takes_batches_of_its_own_width_only():
    source = inspect.getsource(DecodeCudaGraphRunner.can_run_graph)
    assert "num_tokens_per_req != self.captured_req_width" in source


def test_results_are_cut_by_the_width_of_their_own_step():
    source = inspect.getsource(batch_result_processor._get_speculative_output_stride)
    assert "result.speculative_num_draft_tokens" in source


def test_who_else_copies_the_drafters_pool_is_known_when_context_may_wait():
    """`WorkerStart` asks at `init_cuda_graphs`."""
    assert isinstance(BaseSpecWorker.hicache_draft_plan, property)
    assert HiCacheDraftPlan().device_pools == ()
    assert "init_hicache_draft_plan()" in inspect.getsource(Scheduler.init_memory_pools)
    start = inspect.getsource(Scheduler.init_model_worker)
    assert start.index("self.init_memory_pools()") < start.index("self.init_all_cuda_graphs()")


def test_metrics_carry_the_labels_by_which_servers_and_ranks_are_told_apart(monkeypatch):
    source = inspect.getsource(SchedulerMetricsCollector.init_new)
    theirs = set(re.findall(r'^ +"(\w+)": |labels\["(\w+)"\]', source, re.MULTILINE))
    facts = SimpleNamespace(
        **{"tp_rank": 1, "pp_rank": 0, "dp_rank": 3, "served_model_name": "target"},
        **{"enable_pd_role_switch": False, "disaggregation_mode": "decode"},
        extra_metric_labels={"zone": "b"},
    )
    for context in ("parallel", "disagg", "serving", "observability"):
        monkeypatch.setattr(arms, f"get_{context}", lambda: facts)
    ours = arms._metric_labels()
    assert ours == {
        **{"model_name": "target", "engine_type": "decode", "zone": "b"},
        **{"tp_rank": "1", "pp_rank": "0", "dp_rank": "3"},
    }
    assert {a or b for a, b in theirs} - ours.keys() == {"moe_ep_rank", "priority"}
