"""The processor, for whoever says what a figure was measured on."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Name the processor's model; the platform's own word for it where it is not Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]
