"""DFlash drafters: training exports them to compare with, and SGLang serves them by itself.

The configuration is kept as in AngelSlim's dialect of DFlare, under the architecture
DFlashDraftModel. `fc` projects all taps at once, in place of fusion logits and context projections
(sglang/srt/models/dflash.py).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from dflare.checkpoint.config import DraftConfig
from dflare.checkpoint.dialects import is_dflash
from dflare.checkpoint.folder import find_folder, read_json
from dflare.checkpoint.headers import Advice, Expected, compare, read_headers
from dflare.checkpoint.problems import raise_problems
from dflare.checkpoint.reader import parse_config
from dflare.checkpoint.tensors import FUSION_WEIGHTS, expected_tensors, read_tensors

if TYPE_CHECKING:
    import torch


def read_dflash_config(path: str | Path) -> DraftConfig | None:
    """Read config.json of a DFlash drafter.

    Args:
        path: Folder or hub id.

    Returns:
        The configuration, or none where config.json is of another drafter.

    Raises:
        CheckpointError: Not there, or with values that make no sense.
    """
    file = find_folder(path) / "config.json"
    content = read_json(file)
    return parse_config(content, file, "angelslim") if is_dflash(content) else None


def load_dflash_tensors(path: str | Path, config: DraftConfig) -> dict[str, "torch.Tensor"]:
    """Load the weights of a DFlash drafter, on the CPU.

    Args:
        path: Folder or hub id.
        config: Its configuration.

    Returns:
        Tensors by name, in the dtype of the file; linear weights are [out, in], `fc.weight` is
        [H, T x H].

    Raises:
        CheckpointError: Every tensor that is missing, unknown or of a wrong shape.
    """
    folder = find_folder(path)
    headers = read_headers(folder)
    expected = {
        name: Expected(shape, None)
        for name, shape in expected_tensors(config).items()
        if name != FUSION_WEIGHTS and "_target." not in name
    }
    projection = (config.hidden_size, config.num_taps * config.hidden_size)
    expected["fc.weight"] = Expected(projection, None)
    advice = Advice(
        "fetch it again",
        "DFlash has none of these",
        " from config.json; correct it, or fetch the weights that belong to it",
    )
    raise_problems(folder, compare(headers, expected, advice))
    return read_tensors(headers)
