"""Strict loading: SGLang's own loaders skip tensors that they do not know, this one names them."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_parallel

from dflare.checkpoint import expected_tensors
from dflare.errors import CheckpointError

# (our parameter, checkpoint name, shard of the stacked parameter)
_STACKED = (
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
)
_CONTEXT = re.compile(r"layers\.(\d+)\.self_attn\.([kv])_proj_target\.(weight|bias)")


def load_strictly(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fill every parameter of a `QwenDFlareDraftModel` from named tensors.

    That they are finite was seen before, by `checkpoint.check_finite`.

    Args:
        model: the drafter, built for this tensor-parallel rank.
        weights: (checkpoint name, full unsharded tensor) pairs, in any order.

    Raises:
        CheckpointError: one message with every unknown, missing or misshapen tensor.
    """
    params = dict(model.named_parameters())
    missing = set(expected_tensors(model.draft_config))
    problems: list[str] = []
    for name, tensor in weights:
        name = name.removeprefix("model.")
        if name not in missing:
            problems.append(f"unknown tensor {name} {list(tensor.shape)}")
            continue
        missing.remove(name)
        try:
            _load_one(model, params, name, tensor)
        except (AssertionError, RuntimeError, ValueError) as error:
            problems.append(f"{name} {list(tensor.shape)} does not fit: {error}")
    problems += [f"missing tensor {name}" for name in sorted(missing)]
    if problems:
        raise CheckpointError(
            "the drafter's weights do not fit its config.json: "
            + "; ".join(problems)
            + ". Check the checkpoint with `dflare inspect`"
        )


def _load_one(model: Any, params: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
    if context := _CONTEXT.fullmatch(name):
        stacked = params["context_kv_proj" if context[3] == "weight" else "context_kv_bias"]
        _load_context_rows(model, stacked.data[int(context[1])], context[2], tensor)
        return
    for ours, theirs, shard in _STACKED:
        if f".{theirs}." in name:
            param = params[name.replace(theirs, ours)]
            param.weight_loader(param, tensor, shard)
            return
    param = params[name]
    getattr(param, "weight_loader", default_weight_loader)(param, tensor)


def _load_context_rows(model: Any, rows: torch.Tensor, which: str, tensor: torch.Tensor) -> None:
    """Copy this rank's KV heads of k_proj_target or v_proj_target into its half of `rows`.

    As in SGLang's QKVParallelLinear, ranks share a KV head where there are more ranks than heads.
    """
    draft = model.draft_config
    total = draft.num_key_value_heads * draft.head_dim
    if tensor.shape[0] != total:
        raise ValueError(f"expected {total} rows ({draft.num_key_value_heads} KV heads)")
    local = rows.shape[0] // 2
    replicas = max(1, model.layers[0].self_attn.qkv_proj.num_kv_head_replicas)
    first = get_parallel().tp_rank // replicas * local
    start = 0 if which == "k" else local
    rows[start : start + local].copy_(tensor[first : first + local])
