"""DFlare drafter checkpoints: configuration, dialects, validation, loading and saving."""

from dflare.checkpoint.config import DraftConfig, Rope, make_config, spread_taps
from dflare.checkpoint.convert import convert
from dflare.checkpoint.headers import TensorHeader, read_headers
from dflare.checkpoint.reader import find_folder, read_config
from dflare.checkpoint.save import save_checkpoint
from dflare.checkpoint.sizes import DraftSizes, draft_sizes, target_kv_bytes_per_token
from dflare.checkpoint.tensors import check_finite, check_tensors, expected_tensors, load_tensors

__all__ = [
    "DraftConfig",
    "DraftSizes",
    "Rope",
    "TensorHeader",
    "check_finite",
    "check_tensors",
    "convert",
    "draft_sizes",
    "expected_tensors",
    "find_folder",
    "load_tensors",
    "make_config",
    "read_config",
    "read_headers",
    "save_checkpoint",
    "spread_taps",
    "target_kv_bytes_per_token",
]
