"""The ways in which DFlare drafters are written down, and the way to AngelSlim's, which is ours.

- `angelslim`: architecture QwenDFlareDraftModel (Tencent/AngelSlim, angelslim/compressor/
  speculative/train/models/draft/qwen_dflare.py). Taps and mask token in `dflash_config`.
- `angelspec`: DFlashDraftModel with `model_arch: "dflare"` (Tencent/AngelSpec, angelspec/models/
  draft/dflare.py). Flat keys, `num_target_layers` is T and `target_num_hidden_layers` the target's
  depth; the norms are `context_norm` and `final_norm`; a frozen copy of the target's embedding.
- `vllm`: DFlareQwen3Model or DFlareQwen3ForCausalLM (vllm-project/vllm, pull requests 48474 and
  49023, both closed). Keys and names of either of the above; a `model.` prefix is allowed.
"""

import re
from typing import Any, Literal

from dflare.errors import CheckpointError

Dialect = Literal["angelslim", "angelspec", "vllm"]

ARCHITECTURES: dict[str, Dialect] = {
    "QwenDFlareDraftModel": "angelslim",
    "DFlareQwen3Model": "vllm",
    "DFlareQwen3ForCausalLM": "vllm",
}
DFLASH_ADVICE = "this is a DFlash checkpoint: serve it with --speculative-algorithm DFLASH"
_DFLASH_ARCHITECTURES = {"DFlashDraftModel", "QwenDFlashDraftModel"}
_NORM_NAMES = {"context_norm.weight": "hidden_norm.weight", "final_norm.weight": "norm.weight"}


def is_dflash(content: dict[str, Any]) -> bool:
    """Tell whether a parsed config.json is a DFlash drafter's, not a DFlare one's."""
    names = content.get("architectures")
    known = isinstance(names, list) and not _DFLASH_ARCHITECTURES.isdisjoint(names)
    return known and content.get("model_arch", "dflash") == "dflash"


def detect_dialect(content: dict[str, Any], source: object) -> Dialect:
    """Tell the dialect of a parsed config.json.

    Raises:
        CheckpointError: Not a DFlare drafter; says what it is where that can be told.
    """
    architectures = content.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if "speculators_model_type" in content:
        kind = content["speculators_model_type"]
        raise CheckpointError(
            f"{source}: `speculators_model_type` is {kind!r}: a checkpoint of "
            "vllm-project/speculators, which has a context norm for each layer where DFlare has "
            "one; use a drafter trained by AngelSlim, AngelSpec or `dflare train`"
        )
    if is_dflash(content):
        raise CheckpointError(f"{source}: {DFLASH_ADVICE}")
    if _DFLASH_ARCHITECTURES.intersection(names):
        model_arch = content["model_arch"]
        if model_arch == "dflare":
            return "angelspec"
        raise CheckpointError(
            f'{source}: `model_arch` is {model_arch!r}, expected "dflare"; this package serves '
            "DFlare drafters only"
        )
    raise CheckpointError(
        f"{source}: `architectures` is {architectures!r}, expected one of "
        f'{", ".join(ARCHITECTURES)}, or DFlashDraftModel with "model_arch": "dflare"; '
        "give the folder of a DFlare drafter"
    )


def angelslim_name(name: str, dialect: Dialect) -> str | None:
    """Return what AngelSlim calls a tensor.

    Args:
        name: As the checkpoint has it.
        dialect: The checkpoint's.

    Returns:
        The name, or none for the copy of the target's embedding that AngelSpec saves, frozen: a
        drafter uses the target's.
    """
    if dialect == "angelslim":
        return name
    if dialect == "vllm":
        name = name.removeprefix("model.")
    if name == "embed_tokens.weight":
        return None
    return _NORM_NAMES.get(name, name)


def layer_of(name: str) -> int | None:
    """Return the draft layer that an AngelSlim tensor name belongs to, if it belongs to one."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match.group(1)) if match else None
