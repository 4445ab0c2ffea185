"""What a figure was measured with."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from dflare.processor import processor_name


def provenance() -> dict[str, str]:
    """Device, versions and revision of this process, for every record that it writes."""
    import torch

    import dflare.ops  # noqa: F401  (registers the operator that knows)

    instructions = torch.ops.dflare.cpu_isa()
    processor = f"{processor_name()}, {os.cpu_count()} logical cores, {instructions}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    packages = ("sglang", "torch", "sglang-dflare", "sglang-kernel")
    revision = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "device": device,
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "python": platform.python_version(),
        "revision": revision or "unknown",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
    }
