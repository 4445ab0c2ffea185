"""Everything that is worth knowing of a drafter, and of a pair, in one structure."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflare.checkpoint.config import DraftConfig
from dflare.checkpoint.folder import find_folder
from dflare.checkpoint.pair import Check, pair_checks, read_target_config
from dflare.checkpoint.reader import read_config
from dflare.checkpoint.sizes import DraftSizes, draft_sizes, target_kv_bytes_per_token
from dflare.checkpoint.tensors import FUSION_WEIGHTS, check_finite, check_tensors, load_tensors
from dflare.errors import CheckpointError


@dataclass(frozen=True)
class Inspection:
    """What `dflare inspect` shows.

    Attributes:
        folder: Where the drafter lies.
        config: Its configuration.
        sizes: Its parameters and bytes.
        fusion: [D][T] softmax of `layer_fusion_weights`, or none if the tensors are unsound.
        target_kv_bytes_per_token: For the target, if one was given and it has K and V heads.
        checks: What was looked at, with the outcome.
    """

    folder: Path
    config: DraftConfig
    sizes: DraftSizes
    fusion: list[list[float]] | None
    target_kv_bytes_per_token: int | None
    checks: list[Check]

    @property
    def failed(self) -> list[Check]:
        """The checks that make the checkpoint or the pair useless."""
        return [check for check in self.checks if check.status == "failed"]

    @property
    def dominant_taps(self) -> list[int]:
        """The target layer that each draft layer listens to most; empty without `fusion`."""
        ids = self.config.target_layer_ids
        return [ids[row.index(max(row))] for row in self.fusion or []]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "draft": str(self.folder),
            "dialect": self.config.dialect,
            "config": self.config.model_dump(mode="json", exclude={"dialect"}),
            **self.sizes.to_dict(),
            "target_kv_bytes_per_token": self.target_kv_bytes_per_token,
            "fusion": self.fusion,
            "dominant_taps": self.dominant_taps,
            "checks": [check.to_dict() for check in self.checks],
        }


def inspect_draft(draft: str | Path, target: str | Path | None = None) -> Inspection:
    """Read a drafter and run every check on it, and on the pair if a target is given.

    Args:
        draft: Folder or hub id of the drafter.
        target: Folder or hub id of the target.

    Raises:
        CheckpointError: Drafter or target have no readable configuration, so that nothing else can
            be looked at. Whatever else is wrong is a failed check.
    """
    folder = find_folder(draft)
    config = read_config(folder)
    checks = [Check("configuration", "ok", f"{config.dialect} dialect"), *_window_notes(config)]
    fusion = None
    try:
        count = len(check_tensors(folder, config))
        checks.append(Check("tensors", "ok", f"{count} tensors, none missing, none unknown"))
        check_finite(folder, config)
        checks.append(Check("values", "ok", "all finite"))
        fusion = _softmax(load_tensors(folder, config, [FUSION_WEIGHTS])[FUSION_WEIGHTS].tolist())
    except CheckpointError as error:
        detail = str(error).removeprefix(f"{folder}: ")
        sound = any(check.name == "tensors" for check in checks)
        checks.append(Check("values" if sound else "tensors", "failed", detail))
    kv_bytes = None
    if target is not None:
        kv_bytes = target_kv_bytes_per_token(read_target_config(target))
        checks += pair_checks(config, target, folder)
    return Inspection(folder, config, draft_sizes(config), fusion, kv_bytes, checks)


def _window_notes(config: DraftConfig) -> list[Check]:
    """Programs differ on what a window means in a block of drafts; only its trainer knows."""
    sliding = [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
    if not sliding:
        return []
    return [
        Check(
            "sliding window",
            "note",
            f"layers {', '.join(map(str, sliding))} see {config.sliding_window} tokens. Served, as "
            "by SGLang, that window is causal inside the block, which is how `dflare train` "
            "trains. AngelSlim's training ignores it with eager, sdpa and flex attention, and "
            "FlashAttention 2 there looks as far ahead as back. For a drafter trained with the "
            'window ignored, make every entry of `layer_types` "full_attention" and '
            "`use_sliding_window` false; else many drafts differ from what it learned",
        )
    ]


def _softmax(logits: list[list[float]]) -> list[list[float]]:
    rows = []
    for row in logits:
        powers = [math.exp(value - max(row)) for value in row]
        rows.append([power / sum(powers) for power in powers])
    return rows
