"""What can be told about a drafter and its target before anything is loaded."""

from dflare.checkpoint import DraftConfig, check_finite, check_pair, find_folder, read_config
from dflare.checkpoint.config import MAX_BLOCK_SIZE
from dflare.engine.kernel_check import check_kernels
from dflare.errors import CheckpointError, UnsupportedError


def check_server_pair(server_args) -> DraftConfig:
    """Validate the drafter, the target and the flags of a server that is about to start.

    Args:
        server_args: SGLang's arguments, read only.

    Returns:
        The drafter's configuration.

    Raises:
        DFlareError: the first thing that is wrong: given, expected, what to do.
    """
    path = server_args.speculative_draft_model_path
    if path is None:
        raise CheckpointError(
            "no drafter given; pass --speculative-draft-model-path DRAFT (a folder or a "
            "Hugging Face id of a DFlare checkpoint)"
        )
    folder = find_folder(path, revision=server_args.speculative_draft_model_revision)
    draft = read_config(folder)
    if draft.dialect != "angelslim":
        raise CheckpointError(
            f"{path} is in the {draft.dialect} dialect; convert it once: dflare convert {path} DST"
        )
    _check_flags(server_args)
    _check_block_size(server_args, draft)
    check_kernels(server_args, draft)
    check_finite(folder, draft)
    _check_target(server_args, draft)
    return draft


# Flags that DFLASH takes and DFLARE does not, with what there is instead. SGLang itself refuses
# --speculative-use-block-verification, --enable-layernorm-sp and CP/TP group sharing by name.
_REFUSED_FLAGS = {
    "enable_lora": "the CUDA graphs of its several widths share SGLang's one set of LoRA metadata; "
    "serve adapters without speculation or with DFLASH",
    "lora_paths": "see --enable-lora: serve adapters without speculation or with DFLASH",
    "enable_unified_memory": "the drafter's kernels index the target's slots, which that pool "
    "translates; leave it out",
    "enable_linear_replayssm_spec": "its commit is written for other drafters; leave it out",
}
_DRAFT_KV_DTYPES = (None, "auto", "bf16", "bfloat16")


def _check_flags(server_args) -> None:
    for name, instead in _REFUSED_FLAGS.items():
        if getattr(server_args, name):
            flag = f"--{name.replace('_', '-')}"
            raise UnsupportedError(f"{flag} does not go with DFLARE: {instead}")
    dtype = server_args.speculative_draft_kv_cache_dtype
    if dtype not in _DRAFT_KV_DTYPES:
        raise UnsupportedError(
            f"--speculative-draft-kv-cache-dtype is {dtype}, and DFLARE keeps the drafter's K/V in "
            "its own dtype: leave it out (the target's --kv-cache-dtype may stay as it is)"
        )


def _check_block_size(server_args, draft: DraftConfig) -> None:
    for flag in ("speculative_num_draft_tokens", "speculative_dflash_block_size"):
        given = getattr(server_args, flag)
        if given is not None and not 2 <= int(given) <= MAX_BLOCK_SIZE:
            raise UnsupportedError(
                f"--{flag.replace('_', '-')} is {given}, expected 2 to {MAX_BLOCK_SIZE}; leave it "
                f"out to use the drafter's own block size, {draft.block_size}"
            )


def _check_target(server_args, draft: DraftConfig) -> None:
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.models.registry import ModelRegistry

    target = model_config_of(server_args)
    model_class, architecture = ModelRegistry.resolve_model_cls(target.hf_config.architectures)
    if not hasattr(model_class, "set_dflash_layers_to_capture"):
        raise UnsupportedError(
            f"the target architecture {architecture} offers no hidden states to a block drafter in "
            "this SGLang; use a target whose SGLang model has set_dflash_layers_to_capture "
            "(Llama, Qwen3, GPT-OSS and others), or serve without --speculative-algorithm"
        )
    check_pair(draft, target.hf_text_config)
