"""Hooks into SGLang where it offers no other way in; each says why it is needed.

`HookRegistry` (sglang/srt/plugins/hook_registry.py) patches the function and every module that
imported it by name.
"""

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from dflare.engine.plugin import ALGORITHM
from dflare.engine.request_guard import register_guard


def register_hooks() -> None:
    """Register what every device needs and, on our CPU platform, what only that one needs."""
    # Two places know the DFLASH family by name only, not through the algorithm object.
    HookRegistry.register(
        "sglang.srt.arg_groups.model_override_base._forces_eagle_topk_one",
        _forces_eagle_topk_one,
        HookType.AROUND,
    )
    HookRegistry.register(
        "sglang.srt.speculative.spec_utils.spec_need_hidden_states",
        _spec_need_hidden_states,
        HookType.AROUND,
    )
    # Its caller is in the middle of a long method: penalties come before logit bias and grammar.
    HookRegistry.register(
        "sglang.srt.speculative.dflash_utils.apply_dflash_verify_logits_adjustments",
        _apply_penalties_first,
        HookType.AROUND,
    )
    register_guard()
    from sglang.srt.platforms import current_platform

    from dflare.engine.platform import CpuPlatform

    if isinstance(current_platform, CpuPlatform):
        _register_cpu_hooks()


def _forces_eagle_topk_one(original, speculative_algorithm) -> bool:
    return str(speculative_algorithm).upper() == ALGORITHM or original(speculative_algorithm)


def _spec_need_hidden_states(original) -> bool:
    from sglang.srt.runtime_context import get_spec

    # Like DFLASH, the drafter's context lives in its own pool: nothing is relayed between steps.
    return get_spec().speculative_algorithm != ALGORITHM and original()


def _apply_penalties_first(original, *, next_token_logits, sampling_info, draft_token_num) -> None:
    penalise = getattr(sampling_info, "dflare_penalise", None)
    if penalise is not None:
        penalise(next_token_logits, draft_token_num)
    original(
        next_token_logits=next_token_logits,
        sampling_info=sampling_info,
        draft_token_num=draft_token_num,
    )


def _register_cpu_hooks() -> None:
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    from dflare.engine.cpu_memory import assign_req_to_token_pool

    # Both launch Triton kernels for any attention backend that is not called torch_native.
    HookRegistry.register(
        "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func",
        assign_req_to_token_pool,
        HookType.REPLACE,
    )
    HookRegistry.register(
        "sglang.srt.mem_cache.allocation.get_last_loc", get_last_loc_torch, HookType.REPLACE
    )
    # Its custom op is registered for SGLang's own devices only.
    HookRegistry.register(
        "sglang.srt.distributed.parallel_state.GroupCoordinator.all_gather_into_tensor",
        _all_gather_into_tensor,
        HookType.REPLACE,
    )


def _all_gather_into_tensor(group, output, input) -> None:
    group._all_gather_into_tensor(output, input)
