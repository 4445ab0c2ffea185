"""A drafter's tensors: which there must be, whether they are there, whether they are sound."""

import math
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dflare.checkpoint.config import DraftConfig
from dflare.checkpoint.dialects import DFLASH_ADVICE, angelslim_name
from dflare.checkpoint.folder import find_folder
from dflare.checkpoint.headers import Advice, Expected, TensorHeader, compare, read_headers
from dflare.checkpoint.problems import name_some, raise_problems
from dflare.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FUSION_WEIGHTS = "layer_fusion_weights"
# Of a drafter with a draft vocabulary: token id less row of the draft head, as in EAGLE-3's
# checkpoints (SafeAILab/EAGLE, eagle/model/cnets.py).
DRAFT_TO_TARGET = "d2t"
# DFlash's one projection of all taps: fc in z-lab's and SGLang's code, context_proj in AngelSpec's.
_DFLASH_TENSORS = {"fc.weight", "context_proj.weight"}


def expected_tensors(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a drafter by its AngelSlim name.

    Linear weights are [out, in]; with `attention_bias` each attention projection has a bias [out].
    AngelSlim, angelslim/compressor/speculative/train/models/draft/qwen_dflare.py.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    projections = {
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "k_proj_target": (kv, hidden),
        "v_proj_target": (kv, hidden),
        "o_proj": (hidden, q),
    }
    shapes: dict[str, tuple[int, ...]] = {
        FUSION_WEIGHTS: (config.num_hidden_layers, config.num_taps),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}"
        for name, shape in projections.items():
            shapes[f"{prefix}.self_attn.{name}.weight"] = shape
            if config.attention_bias:
                shapes[f"{prefix}.self_attn.{name}.bias"] = shape[:1]
        shapes[f"{prefix}.self_attn.q_norm.weight"] = (config.head_dim,)
        shapes[f"{prefix}.self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    if config.draft_vocab_size is not None:
        shapes[DRAFT_TO_TARGET] = (config.draft_vocab_size,)
    return shapes


def expected_dtype(name: str, config: DraftConfig) -> str:
    """Return the dtype of a tensor: everything but token ids has the configuration's."""
    return "int64" if name == DRAFT_TO_TARGET else config.dtype


def expected_headers(config: DraftConfig) -> dict[str, Expected]:
    """Return shape and dtype of every tensor of a drafter by its AngelSlim name."""
    return {
        name: Expected(shape, expected_dtype(name, config))
        for name, shape in expected_tensors(config).items()
    }


def draft_vocabulary(d2t: "torch.Tensor", vocab_size: int) -> "torch.Tensor":
    """Return the token id of each row of the draft head.

    Args:
        d2t: [V'] int64, token id less row.
        vocab_size: The target's, V.

    Returns:
        [V'] int64.

    Raises:
        CheckpointError: Ids that do not increase or are not the target's.
    """
    import torch

    ids = d2t + torch.arange(len(d2t), device=d2t.device)
    if int(ids[0]) < 0 or int(ids[-1]) >= vocab_size or not bool((ids.diff() > 0).all()):
        raise CheckpointError(
            f"`{DRAFT_TO_TARGET}` gives token ids {int(ids.min())} to {int(ids.max())}, expected "
            f"ids from 0 to {vocab_size - 1} that increase; write it with `dflare draft-vocab`"
        )
    return ids


def check_tensors(path: str | Path, config: DraftConfig) -> dict[str, TensorHeader]:
    """Hold the tensors of a checkpoint against its configuration, both ways, from headers alone.

    Returns:
        Headers by AngelSlim name.

    Raises:
        CheckpointError: Everything that is missing, unknown or has a wrong shape or dtype.
    """
    folder = find_folder(path)
    headers = read_headers(folder)
    if FUSION_WEIGHTS not in headers and _DFLASH_TENSORS & headers.keys():
        raise CheckpointError(f"{folder}: {DFLASH_ADVICE}")
    renamed: dict[str, TensorHeader] = {}
    problems = []
    for header in headers.values():
        name = angelslim_name(header.name, config.dialect)
        if name is None:
            continue
        if name in renamed:
            problems.append(f"`{renamed[name].name}` and `{header.name}` are the same; remove one")
        renamed[name] = header
    advice = Advice(
        "fetch the checkpoint again, or convert it with `dflare convert` if it is of another "
        "dialect",
        f"a DFlare drafter of the {config.dialect} dialect has none of these: remove them, or use "
        "the program that they are for",
        f" from config.json, which has D = {config.num_hidden_layers} draft layers and T = "
        f"{config.num_taps} taps {list(config.target_layer_ids)}; correct it (`num_hidden_layers`, "
        "`target_layer_ids`, sizes), or fetch the weights that belong to it",
        " as config.json says; save it so, or correct `torch_dtype`",
    )
    raise_problems(folder, problems + compare(renamed, expected_headers(config), advice))
    return renamed


def load_tensors(
    path: str | Path, config: DraftConfig, names: Collection[str] | None = None
) -> dict[str, "torch.Tensor"]:
    """Load weights by AngelSlim name, on the CPU, after `check_tensors`.

    Args:
        path: Folder or hub id.
        config: Its configuration.
        names: Which to load; default all.
    """
    headers = check_tensors(path, config)
    return read_tensors(
        {name: header for name, header in headers.items() if names is None or name in names}
    )


def read_tensors(headers: dict[str, TensorHeader]) -> dict[str, "torch.Tensor"]:
    """Read weights on the CPU, opening every file once.

    Args:
        headers: By the names that the result shall have.
    """
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted({header.file for header in headers.values()}):
        with safe_open(file, framework="pt") as weights:
            for name, header in headers.items():
                if header.file == file:
                    tensors[name] = weights.get_tensor(header.name)
    return tensors


def check_finite(path: str | Path, config: DraftConfig) -> None:
    """Look for NaN and infinity in every weight, one tensor at a time, and at the token ids.

    Raises:
        CheckpointError: Names the tensors and how many bad values each has.
    """
    bad = []
    headers = check_tensors(path, config)
    for header in headers.values():
        stat = header.file.stat()
        count = _unsound_values(header.file, stat.st_size, stat.st_mtime_ns).get(header.name, 0)
        if count:
            bad.append(f"`{header.name}` ({count} of {math.prod(header.shape)})")
    if bad:
        raise CheckpointError(
            f"{find_folder(path)}: NaN or infinite weights in {name_some(bad)}; "
            "export the drafter again from a sound training step"
        )
    if ids := headers.get(DRAFT_TO_TARGET):
        draft_vocabulary(read_tensors({DRAFT_TO_TARGET: ids})[DRAFT_TO_TARGET], config.vocab_size)


@cache
def _unsound_values(file: Path, _size: int, _mtime_ns: int) -> dict[str, int]:
    """Count NaN and infinity by tensor; a server's checks read a file that stays as it is once."""
    import torch
    from safetensors import safe_open

    counts = {}
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118  (not a dict)
            values = weights.get_tensor(name)
            # A NaN anywhere makes both extremes NaN; 50 times faster than looking at each value.
            if values.is_floating_point() and values.numel():
                extremes = torch.stack(torch.aminmax(values))
                if not torch.isfinite(extremes).all():
                    counts[name] = int((~torch.isfinite(values)).sum())
    return counts
