"""This package's operators on the device: its CUDA launchers and kernels on the host emulator."""

import emulated
import torch
from device import DEVICE

_OPERATORS = (
    "append_context_kv",
    "block_attention",
    "block_attention_schedule",
    "lookup_continuations",
)


def install() -> None:
    """Build the emulated launchers, or find them built, and let CUDA tensors go to them."""
    torch.ops.load_library(str(emulated.build_launchers()))
    from dflare import ops  # noqa: F401 - loads torch.ops.dflare

    for name in _OPERATORS:
        DEVICE.override_op(f"dflare::{name}", "", f"dflare_emulated::{name}")
