"""Read a drafter's config.json: find it, tell the dialect, refuse what is not understood."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dflare.checkpoint.config import DraftConfig, make_config, spread_taps
from dflare.checkpoint.dialects import detect_dialect
from dflare.checkpoint.problems import raise_problems
from dflare.errors import CheckpointError

# Read under the same name in every dialect.
_PLAIN_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "vocab_size",
    "attention_bias",
    "hidden_act",
)
# Settings of other drafters of the family: with any other value the computation is not DFlare's.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "logit_scale": (None, 1, 1.0),
    "final_logit_softcapping": (None, 0, 0.0),
    "projector_type": (None,),
    "markov_rank": (None, 0),
    "enable_hidden_correction": (None, False),
}
_DFLASH_CONFIG_KEYS = {"mask_token_id", "target_layer_ids", "mask_token", "block_size"}
_DRAFT_FILES = ("*.json", "*.safetensors")


def find_folder(path: str | Path, files: Sequence[str] = _DRAFT_FILES) -> Path:
    """Return the folder of a checkpoint; one that is not local comes from the Hugging Face hub.

    Args:
        path: A folder, or a hub id such as `AngelSlim/Qwen3-4b-dflare`.
        files: Patterns of what to fetch from the hub.

    Raises:
        CheckpointError: No such folder, and no such repository or no way to reach it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{path}: this is a file, expected a folder with config.json in it")
    if not _is_hub_id(str(path)):
        raise CheckpointError(
            f"{path}: no such folder; give a folder with config.json and *.safetensors, or the id "
            "of a Hugging Face repository (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(files)))
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            reason = "the hub has no such repository, or it is private: check the id, or log in"
        else:
            reason = (
                "the hub cannot be reached and no earlier download is cached: check the network"
            )
        raise CheckpointError(
            f"{path}: no such folder, and {reason} ({_first_line(error)})"
        ) from error


def _is_hub_id(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and not path.startswith((".", "~"))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON file that holds one object.

    Raises:
        CheckpointError: Missing, unreadable, not JSON or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: no such file; give a folder with config.json and *.safetensors"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, expected a JSON object")
    return content


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
    dialect = detect_dialect(content, file)
    values: dict[str, Any] = {key: content[key] for key in _PLAIN_KEYS if key in content}
    values["dialect"] = dialect
    problems: list[str] = []

    nested = _nested_settings(content, problems)
    in_nested = dialect == "angelslim" or bool(nested)
    prefix = "dflash_config." if in_nested else ""
    keys = {
        "mask_token_id": f"{prefix}mask_token_id",
        "target_layer_ids": f"{prefix}target_layer_ids",
    }
    settings = nested if dialect == "angelslim" else {**content, **nested}
    if "mask_token_id" in settings:
        values["mask_token_id"] = settings["mask_token_id"]

    # AngelSpec calls T `num_target_layers`; AngelSlim calls the target's depth so.
    depth_key = "target_num_hidden_layers"
    if dialect == "angelslim" or depth_key not in content:
        depth_key = "num_target_layers"
    keys["num_target_layers"] = depth_key
    if depth_key in content:
        values["num_target_layers"] = content[depth_key]

    size = (
        block_size
        if block_size is not None
        else settings.get("block_size", content.get("block_size"))
    )
    if size is not None:
        values["block_size"] = size
    values["head_dim"] = content.get("head_dim")
    if values["head_dim"] is None:
        del values["head_dim"]
        heads = content.get("num_attention_heads")
        if dialect != "angelslim" and isinstance(heads, int) and heads > 0:
            values["head_dim"] = content.get("hidden_size", 0) // heads
    values["rope"] = _rope(content, problems)
    values["dtype"] = _dtype(content, problems)
    _read_layer_types(content, values, problems)
    _refuse_other_drafters(content, problems)
    raise_problems(file, problems)
    values["target_layer_ids"] = _taps(settings, values, content)
    return make_config(values, file, keys)


def _nested_settings(content: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Merge `dflash_config` and vLLM's `dflare_config`; refuse unknown keys in them."""
    merged: dict[str, Any] = {}
    for key in ("dflash_config", "dflare_config"):
        value = content.get(key) or {}
        if not isinstance(value, dict):
            problems.append(f"`{key}` is {value!r}, expected an object; correct it")
            continue
        for unknown in sorted(set(value) - _DFLASH_CONFIG_KEYS):
            problems.append(
                f"`{key}.{unknown}` is {value[unknown]!r}, a setting that DFlare does not have; "
                "remove it if the drafter was trained without it"
            )
        merged.update(value)
    return merged


def _taps(
    settings: dict[str, Any], values: dict[str, Any], content: dict[str, Any]
) -> tuple[Any, ...] | Any:
    taps = settings.get("target_layer_ids")
    # vLLM captures what goes into a layer, so its ids are one higher than ours.
    captured = content.get("eagle_aux_hidden_state_layer_ids")
    if taps is None and values["dialect"] == "vllm" and isinstance(captured, list):
        taps = [layer - 1 if isinstance(layer, int) else layer for layer in captured]
    if taps is None:
        angelspec = values["dialect"] == "angelspec"
        count = content.get("num_target_layers") if angelspec else values.get("num_hidden_layers")
        depth = values.get("num_target_layers")
        if not isinstance(count, int) or not isinstance(depth, int) or min(count, depth) < 1:
            return ()
        return spread_taps(depth, count)
    return tuple(taps) if isinstance(taps, list) else taps


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


def _read_layer_types(content: dict[str, Any], values: dict[str, Any], problems: list[str]) -> None:
    layers, types = content.get("num_hidden_layers"), content.get("layer_types")
    windowed = content.get("use_sliding_window", False)
    if types is None:
        if windowed:
            problems.append(
                "`use_sliding_window` is true and `layer_types` is missing, expected the type of "
                "each draft layer; add it"
            )
        types = ["full_attention"] * layers if isinstance(layers, int) else []
    values["layer_types"] = tuple(types) if isinstance(types, list) else types
    if "sliding_attention" in types:
        values["sliding_window"] = content.get("sliding_window")
        if content.get("use_sliding_window") is False:
            problems.append(
                "`use_sliding_window` is false and `layer_types` has sliding_attention, expected "
                "both or neither: transformers ignores the window then; correct either"
            )


def _refuse_other_drafters(content: dict[str, Any], problems: list[str]) -> None:
    for key, neutral in _NEUTRAL_VALUES.items():
        if content.get(key) not in neutral:
            problems.append(
                f"`{key}` is {content[key]!r}, which DFlare drafters do not have; "
                "use a checkpoint without it"
            )
    draft_vocabulary = content.get("draft_vocab_size")
    if draft_vocabulary not in (None, content.get("vocab_size")):
        problems.append(
            f"`draft_vocab_size` is {draft_vocabulary!r}, expected `vocab_size` = "
            f"{content.get('vocab_size')!r}: a DFlare drafter uses the target's head; "
            "export it without pruning"
        )
    target_hidden = content.get("target_hidden_size")
    if target_hidden not in (None, content.get("hidden_size")):
        problems.append(
            f"`target_hidden_size` is {target_hidden!r}, expected `hidden_size` = "
            f"{content.get('hidden_size')!r}: a DFlare drafter is as wide as its target"
        )
