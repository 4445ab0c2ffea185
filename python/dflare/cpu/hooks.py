"""What the CPU platform replaces inside SGLang; `dflare.engine.hooks` puts it in place."""

from sglang.srt.plugins.hook_registry import HookType

from dflare.engine.hooks import Hook


def _assign_req_to_token_pool(*args) -> None:
    """The original launches a Triton kernel for any attention backend not called torch_native."""
    from dflare.cpu.memory import assign_req_to_token_pool

    assign_req_to_token_pool(*args)


def _get_last_loc(*args):
    """As above."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(*args)


def _murmur_hash32(*args):
    """Its CPU kernel is not in SGLang's wheel."""
    from dflare.cpu.seeds import murmur_hash32

    return murmur_hash32(*args)


def _all_gather_into_tensor(group, output, input) -> None:
    """The original's custom op is registered for SGLang's own devices only."""
    group._all_gather_into_tensor(output, input)


CPU_HOOKS = (
    Hook(
        "sglang.kernels.ops.sampling.murmur_hash.murmur_hash32",
        _murmur_hash32,
        HookType.REPLACE,
        "seed positions col_indices",
    ),
    Hook(
        "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func",
        _assign_req_to_token_pool,
        HookType.REPLACE,
        "req_pool_indices req_to_token start_offset end_offset out_cache_loc batch_size",
    ),
    Hook(
        "sglang.srt.mem_cache.allocation.get_last_loc",
        _get_last_loc,
        HookType.REPLACE,
        "req_to_token req_pool_indices_tensor prefix_lens_tensor",
    ),
    Hook(
        "sglang.srt.distributed.parallel_state.GroupCoordinator.all_gather_into_tensor",
        _all_gather_into_tensor,
        HookType.REPLACE,
        "self output input",
    ),
)
