"""What we rely on inside SGLang 0.5.23: names, parameters and a few facts that no signature tells.

When a new SGLang is tried, this test says at once what moved.
"""

import inspect
import pkgutil

import pytest

PARAMETERS = {
    "sglang.srt.arg_groups.choices.add_attention_backend_choices": "iterable",
    "sglang.srt.arg_groups.choices.add_draft_attention_backend_choices": "iterable",
    "sglang.srt.arg_groups.model_override_base._forces_eagle_topk_one": "speculative_algorithm",
    "sglang.srt.arg_groups.model_override_base.model_config_of": "server_args",
    "sglang.srt.arg_groups.speculative_hook._handle_dflash": "server_args",
    "sglang.srt.distributed.parallel_state.GroupCoordinator._all_gather_into_tensor": (
        "self output input"
    ),
    "sglang.srt.distributed.parallel_state.GroupCoordinator.all_gather_into_tensor": (
        "self output input"
    ),
    "sglang.srt.layers.attention.attention_registry.register_attention_backend": "name",
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.forward_decode": (
        "self q k v layer forward_batch save_kv_cache kwargs"
    ),
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.forward_extend": (
        "self q k v layer forward_batch save_kv_cache kwargs"
    ),
    "sglang.srt.layers.quantization.unquant.UnquantizedEmbeddingMethod.apply": "self layer x bias",
    "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.apply": "self layer x bias",
    "sglang.srt.layers.sampler.sampling_from_probs_torch": "probs sampling_seed positions",
    "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch": (
        "probs top_ks top_ps min_ps need_min_p_sampling sampling_seed positions "
        "return_filtered_probs max_top_k"
    ),
    "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func": (
        "req_pool_indices req_to_token start_offset end_offset out_cache_loc batch_size"
    ),
    "sglang.srt.mem_cache.allocation.get_last_loc": (
        "req_to_token req_pool_indices_tensor prefix_lens_tensor"
    ),
    "sglang.srt.mem_cache.allocation.get_last_loc_torch": (
        "req_to_token req_pool_indices_tensor prefix_lens_tensor"
    ),
    "sglang.srt.models.llama.LlamaModel.forward": (
        "self input_ids positions forward_batch input_embeds pp_proxy_tensors"
    ),
    "sglang.srt.models.qwen2.Qwen2Model.forward": (
        "self input_ids positions forward_batch input_embeds pp_proxy_tensors"
    ),
    "sglang.srt.models.qwen3.Qwen3Model.forward": (
        "self input_ids positions forward_batch input_embeds pp_proxy_tensors"
    ),
    "sglang.srt.models.registry._ModelRegistry.register": "self package_name overwrite strict",
    "sglang.srt.plugins.hook_registry.HookRegistry.register": "target hook hook_type source",
    "sglang.srt.speculative.dflash_utils.apply_dflash_verify_logits_adjustments": (
        "next_token_logits sampling_info draft_token_num"
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2.__init__": (
        "self server_args gpu_id nccl_port target_worker"
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2.alloc_memory_pool": (
        "self memory_pool_config req_to_token_pool token_to_kv_pool_allocator"
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2.forward_batch_generation": (
        "self batch on_publish grammar_barrier pp_proxy_tensors"
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2"
    "._append_target_hidden_to_draft_kv_by_loc": (
        "self target_hidden cache_loc positions cache_loc_2d commit_lens extend_lens"
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2._accept_block": (
        "self candidates next_token_logits sampling_info draft_input prefix_lens bs target_predict"
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2._can_skip_verify_logits": (
        "self batch sampling_info"
    ),
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2"
    "._greedy_sample_from_vocab_parallel_head": "self hidden_states lm_head chunk_size",
    "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2._validate_phase1_sampling_support": (
        "self batch"
    ),
    "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_future_map": (
        "self device req_to_token_pool needs_cpu_seq_lens needs_confidence_relay"
    ),
    "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.register": (
        "name supports_overlap validate_server_args spec_class"
    ),
    "sglang.srt.speculative.spec_utils.spec_need_hidden_states": "",
}


@pytest.mark.parametrize("path", PARAMETERS)
def test_parameters(path):
    function = pkgutil.resolve_name(path)
    assert " ".join(inspect.signature(function).parameters) == PARAMETERS[path]


def test_platform_methods_that_we_override_exist():
    from sglang.srt.platforms.interface import SRTPlatform

    from dflare.cpu.platform import CpuPlatform

    ours = {name for name in vars(CpuPlatform) if not name.startswith("_")}
    assert ours <= set(dir(SRTPlatform)) | {"hooks"}, ours - set(dir(SRTPlatform))


def test_algorithm_answers_every_question_of_the_builtin_ones():
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from dflare.engine.algorithm import DFlareAlgorithm

    ours = DFlareAlgorithm("DFLARE", lambda _: None, supports_overlap=True)
    dflash = SpeculativeAlgorithm.DFLASH
    questions = [
        name
        for name, value in vars(SpeculativeAlgorithm).items()
        if name.startswith(("is_", "supports_", "has_", "carries_", "need_")) and callable(value)
    ]
    assert len(questions) > 15
    for name in questions:
        assert getattr(ours, name)() == getattr(dflash, name)(), name


def test_worker_methods_and_flags_that_we_build_on():
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.speculative import dflash_worker_v2

    source = inspect.getsource(dflash_worker_v2)
    for name in (
        "self.draft_model_runner = ",
        "self.draft_model = ",
        "self._block_pos_offsets = ",
        "self.draft_model.set_block_size(",
        "self._draft_block_tokens_buf[:bs]",
        "supports_fused_context_kv",
        "record_stream(",
    ):
        assert name in source, name
    pool = inspect.getsource(MHATokenToKVPool)
    assert "self.use_native_move_kv_cache" in pool and "def _init_kv_copy_and_warmup" in pool


def test_embeddings_are_still_rounded_on_their_way_to_the_drafter():
    """If this fails, `QwenDFlareDraftModel.forward` no longer needs its detour."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    assert "input_embeds.bfloat16()" in inspect.getsource(ModelRunner._extend_forward_kwargs)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3", "Qwen3Moe", "GptOss"])
def test_targets_that_we_name_offer_their_hidden_states(architecture):
    from sglang.srt.models.registry import ModelRegistry

    model, _ = ModelRegistry.resolve_model_cls([f"{architecture}ForCausalLM"])
    assert hasattr(model, "set_dflash_layers_to_capture")


def test_heads_with_a_method_of_ours_go_through_it():
    from sglang.srt.layers import logits_processor

    from dflare.cpu.layers import CpuEmbeddingMethod

    assert CpuEmbeddingMethod.__name__ not in logits_processor._UNQUANTIZED_LM_HEAD_METHODS
