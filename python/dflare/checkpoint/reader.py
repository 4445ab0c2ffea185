"""Read a drafter's config.json: tell the dialect, refuse what is not understood."""

from pathlib import Path
from typing import Any

from dflare.checkpoint.config import DraftConfig, make_config, spread_taps
from dflare.checkpoint.dialects import Dialect, detect_dialect
from dflare.checkpoint.folder import find_folder, read_json
from dflare.checkpoint.problems import raise_problems
from dflare.errors import CheckpointError

# Read under the same name in every dialect.
_PLAIN_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "vocab_size",
    "block_size",
    "attention_bias",
    "hidden_act",
)
# Where a dialect keeps the rest; the first that is there counts.
_KEYS: dict[Dialect, dict[str, tuple[str, ...]]] = {
    "angelslim": {
        "mask_token_id": ("dflash_config.mask_token_id",),
        "target_layer_ids": ("dflash_config.target_layer_ids",),
        "num_target_layers": ("num_target_layers",),
    },
    "angelspec": {
        "mask_token_id": ("mask_token_id",),
        "target_layer_ids": ("target_layer_ids",),
        "num_target_layers": ("target_num_hidden_layers",),
    },
    "vllm": {
        "mask_token_id": (
            "dflare_config.mask_token_id",
            "dflash_config.mask_token_id",
            "mask_token_id",
        ),
        "target_layer_ids": (
            "dflare_config.target_layer_ids",
            "dflash_config.target_layer_ids",
            "target_layer_ids",
            "eagle_aux_hidden_state_layer_ids",
        ),
        "num_target_layers": ("target_num_hidden_layers", "num_target_layers"),
    },
}
_NESTED_KEYS = {"mask_token_id", "target_layer_ids", "mask_token"}
# Settings of other drafters of the family: with any other value the computation is not DFlare's.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "logit_scale": (None, 1, 1.0),
    "final_logit_softcapping": (None, 0, 0.0),
    "projector_type": (None,),
    "markov_rank": (None, 0),
    "enable_hidden_correction": (None, False),
}


def is_drafter(path: str | Path) -> bool:
    """Whether a local folder holds a DFlare drafter, in any dialect, whole or not."""
    file = Path(path) / "config.json"
    try:
        detect_dialect(read_json(file), file)
    except CheckpointError:
        return False
    return True


def read_config(path: str | Path, *, block_size: int | None = None) -> DraftConfig:
    """Read config.json of a DFlare drafter, in any dialect.

    Args:
        path: Folder or hub id.
        block_size: B, for a checkpoint whose config does not say (AngelSpec's).

    Raises:
        CheckpointError: Not there, not a DFlare drafter, or with values that make no sense: names
            the file, each key, the value, what is expected and what to do.
    """
    file = find_folder(path) / "config.json"
    content = read_json(file)
    return parse_config(content, file, detect_dialect(content, file), block_size)


def parse_config(
    content: dict[str, Any], file: Path, dialect: Dialect, block_size: int | None = None
) -> DraftConfig:
    """Understand a parsed config.json; arguments and errors as of `read_config`."""
    problems: list[str] = []
    values: dict[str, Any] = {key: content[key] for key in _PLAIN_KEYS if key in content}
    values["dialect"] = dialect
    # Other programs also write it where nothing is left out.
    if content.get("draft_vocab_size") != content.get("vocab_size"):
        values["draft_vocab_size"] = content.get("draft_vocab_size")
    if block_size is not None:
        values["block_size"] = block_size
    _refuse_other_drafters(content, problems)
    names = _read_located(content, dialect, values)
    values["rope"] = _rope(content, problems)
    values["dtype"] = _dtype(content, problems)
    _add_layer_types(content, values, problems)
    if dialect != "angelslim":
        _add_head_dim(values)
    raise_problems(file, problems)
    if "target_layer_ids" not in values:
        values["target_layer_ids"] = _default_taps(content, values)
    return make_config(values, file, names)


def _read_located(
    content: dict[str, Any], dialect: Dialect, values: dict[str, Any]
) -> dict[str, str]:
    """Read what dialects keep in different places into `values`; return where each was."""
    names = {}
    for field, paths in _KEYS[dialect].items():
        names[field] = paths[0]
        for path in paths:
            outer, _, inner = path.rpartition(".")
            holder = content.get(outer) if outer else content
            value = holder.get(inner) if isinstance(holder, dict) else None
            if value is not None:
                values[field], names[field] = value, path
                break
    taps = values.get("target_layer_ids")
    if isinstance(taps, list):
        # vLLM captures what goes into a layer, so its own ids are one higher than a tap's.
        shift = 1 if names["target_layer_ids"] == "eagle_aux_hidden_state_layer_ids" else 0
        values["target_layer_ids"] = tuple(tap - shift if type(tap) is int else tap for tap in taps)
    return names


def _default_taps(content: dict[str, Any], values: dict[str, Any]) -> tuple[int, ...]:
    """Return the taps of a drafter that does not say: T = D, but AngelSpec gives T."""
    angelspec = values["dialect"] == "angelspec"
    count = content.get("num_target_layers") if angelspec else values.get("num_hidden_layers")
    depth = values.get("num_target_layers")
    if type(count) is int and type(depth) is int and count > 0 and depth > 0:
        return spread_taps(depth, count)
    return ()


def _add_head_dim(values: dict[str, Any]) -> None:
    """Split the hidden size over the heads, as AngelSpec and vLLM do without a `head_dim`."""
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if values.get("head_dim") is None and type(hidden) is int and type(heads) is int and heads > 0:
        values["head_dim"] = hidden // heads


def _rope(content: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Read `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    parameters = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        problems.append(f"`rope_scaling` is {parameters!r}, expected an object or null; correct it")
        return {"theta": 1.0}
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    if per_layer_type:
        if any(value != per_layer_type[0] for value in per_layer_type):
            problems.append(
                f"`rope_parameters` is {parameters!r}, expected one RoPE for all layers: a drafter "
                "with one for each type of layer is not supported"
            )
        parameters = per_layer_type[0]
    scaling = dict(parameters)
    theta = scaling.pop("rope_theta", None)
    outer = content.get("rope_theta")
    if theta is not None and outer is not None and theta != outer:
        problems.append(
            f"`rope_theta` is {outer!r} and `rope_parameters.rope_theta` is {theta!r}, expected "
            "one value; remove the wrong one"
        )
    rope_type = scaling.pop("rope_type", None)
    old_rope_type = scaling.pop("type", None)
    values = {
        "theta": theta if theta is not None else outer,
        "type": rope_type or old_rope_type or "default",
        "partial_rotary_factor": scaling.pop(
            "partial_rotary_factor", content.get("partial_rotary_factor") or 1.0
        ),
        "parameters": scaling,
    }
    if values["theta"] is None:
        problems.append(
            "`rope_theta` is missing, expected a number above 0; add it as the drafter was trained"
        )
        values["theta"] = 1.0
    return values


def _dtype(content: dict[str, Any], problems: list[str]) -> Any:
    old, new = content.get("torch_dtype"), content.get("dtype")
    if old is not None and new is not None and old != new:
        problems.append(
            f"`torch_dtype` is {old!r} and `dtype` is {new!r}, expected one value; "
            "keep the one that the weights have"
        )
    if old is None and new is None:
        problems.append(
            "`torch_dtype` is missing, expected bfloat16, float16 or float32; add the weights' own"
        )
        return "bfloat16"
    return new if new is not None else old


def _add_layer_types(content: dict[str, Any], values: dict[str, Any], problems: list[str]) -> None:
    layers, types = content.get("num_hidden_layers"), content.get("layer_types")
    windowed = content.get("use_sliding_window")
    if types is None:
        if windowed:
            problems.append(
                "`use_sliding_window` is true and `layer_types` is missing, expected the type of "
                "each draft layer; add it"
            )
        types = ["full_attention"] * layers if type(layers) is int else []
    values["layer_types"] = tuple(types) if isinstance(types, list) else types
    if isinstance(types, list) and "sliding_attention" in types:
        values["sliding_window"] = content.get("sliding_window")
        if windowed is False:
            problems.append(
                "`use_sliding_window` is false and `layer_types` has sliding_attention, expected "
                "both or neither: transformers ignores the window then; correct either"
            )


def _refuse_other_drafters(content: dict[str, Any], problems: list[str]) -> None:
    for outer in ("dflash_config", "dflare_config"):
        nested = content.get(outer) or {}
        if not isinstance(nested, dict):
            problems.append(f"`{outer}` is {nested!r}, expected an object; correct it")
            continue
        for key in sorted(nested.keys() - _NESTED_KEYS):
            problems.append(
                f"`{outer}.{key}` is {nested[key]!r}, a setting that DFlare does not have; "
                "remove it if the drafter was trained without it"
            )
    for key, neutral in _NEUTRAL_VALUES.items():
        if content.get(key) not in neutral:
            problems.append(
                f"`{key}` is {content[key]!r}, which DFlare drafters do not have; "
                "use a checkpoint without it"
            )
    target_hidden = content.get("target_hidden_size")
    if target_hidden not in (None, content.get("hidden_size")):
        problems.append(
            f"`target_hidden_size` is {target_hidden!r}, expected `hidden_size` = "
            f"{content.get('hidden_size')!r}: a DFlare drafter is as wide as its target"
        )
