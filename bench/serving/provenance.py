"""What a figure was measured with."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def provenance() -> dict[str, str]:
    """Device, versions and revision of this process, for every record that it writes."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
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


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""
    )
    return f"{model or platform.processor()}, {os.cpu_count()} logical cores"
