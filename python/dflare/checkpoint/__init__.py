"""DFlare drafter checkpoints: configuration, dialects, validation, loading and saving."""

from dflare.checkpoint.config import DraftConfig, Rope, make_config, spread_taps
from dflare.checkpoint.convert import convert
from dflare.checkpoint.dflash import load_dflash_tensors, read_dflash_config
from dflare.checkpoint.folder import find_folder
from dflare.checkpoint.headers import TensorHeader, read_headers
from dflare.checkpoint.inspection import Inspection, inspect_draft
from dflare.checkpoint.pair import Check, check_pair, pair_checks, read_target_config
from dflare.checkpoint.reader import is_drafter, read_config
from dflare.checkpoint.save import save_checkpoint
from dflare.checkpoint.sizes import DraftSizes, draft_sizes, target_kv_bytes_per_token
from dflare.checkpoint.tensors import (
    DRAFT_TO_TARGET,
    check_finite,
    check_tensors,
    draft_vocabulary,
    expected_tensors,
    load_tensors,
)

__all__ = [
    "DRAFT_TO_TARGET",
    "Check",
    "DraftConfig",
    "DraftSizes",
    "Inspection",
    "Rope",
    "TensorHeader",
    "check_finite",
    "check_pair",
    "check_tensors",
    "convert",
    "draft_sizes",
    "draft_vocabulary",
    "expected_tensors",
    "find_folder",
    "inspect_draft",
    "is_drafter",
    "load_dflash_tensors",
    "load_tensors",
    "make_config",
    "pair_checks",
    "read_config",
    "read_dflash_config",
    "read_headers",
    "read_target_config",
    "save_checkpoint",
    "spread_taps",
    "target_kv_bytes_per_token",
]
