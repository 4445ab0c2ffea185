"""What computes, for whoever says what a figure was measured on."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Name the processor's model; the platform's own word for it where it is not Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def device_name(*, cuda: bool | None = None) -> str:
    """Name what computes in this process: the GPU, or the processor and torch's threads.

    Args:
        cuda: Whether a GPU does; None where torch finds one.
    """
    import torch  # the callers that only name the processor need not wait for it

    if torch.cuda.is_available() if cuda is None else cuda:
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {torch.get_num_threads()} threads"
