"""Facts about the installation and what stands in the way of serving, for `dflare doctor`."""

import logging
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from dflare.engine.names import ALGORITHM
from dflare.engine.version import check_sglang_version
from dflare.errors import DFlareError

_PACKAGES = ("sglang-dflare", "sglang", "torch", "transformers", "triton")


def diagnose(*, load: bool = False) -> dict[str, Any]:
    """Look at everything that serving needs.

    Args:
        load: whether to load the plug-in into SGLang too, as a server would; that takes SGLang's
            own imports, about 15 s.

    Returns:
        `facts`: names and values to print; `problems`: what is wrong and how to fix it, one
        sentence each, empty where all is well.
    """
    facts: dict[str, str] = {"python": platform.python_version()}
    facts |= {name: _version(name) for name in _PACKAGES}
    problems: list[str] = []
    _look_at_extension(facts, problems)
    _look_at_device(facts, problems)
    try:
        check_sglang_version()
    except DFlareError as error:
        problems.append(str(error))
    else:
        _look_at_entry_points(facts, problems)
        if load:
            _look_at_loaded_plugin(facts, problems)
    _look_at_demo(facts)
    return {"facts": facts, "problems": problems}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _look_at_extension(facts: dict[str, str], problems: list[str]) -> None:
    try:
        from dflare import ops
    except ImportError as error:
        facts["extension"] = "missing"
        problems.append(str(error))
        return
    info = ops.build_info()
    cuda = " ".join(info["cuda_archs"]) or f"not built ({info['cuda_missing']})"
    facts["extension"] = f"{info['version']} for torch {info['torch']}, {info['compiler']}"
    facts["CPU kernels"] = " ".join(info["cpu_isas"])
    facts["CUDA kernels"] = cuda


def _look_at_device(facts: dict[str, str], problems: list[str]) -> None:
    import torch

    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(device)
        facts["device"] = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
        _look_at_kernels_for(device, problems)
    else:
        facts["device"] = f"CPU, {os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()})"
    facts["nvcc"] = shutil.which("nvcc") or "not found; needed only to build the CUDA kernels"


def _look_at_kernels_for(device: Any, problems: list[str]) -> None:
    """What a server would refuse at start on this GPU, whatever the drafter."""
    import torch

    try:
        from dflare import ops
    except ImportError:
        return  # reported with the extension
    try:
        ops.check_kernels_for(device)
    except DFlareError as error:
        problems.append(str(error))
        return
    # A toolkit that does not know an architecture leaves it out of the build.
    built = ops.build_info()["cuda_archs"]
    if built and not any(_runs_on(torch.cuda.get_device_capability(device)[0], a) for a in built):
        problems.append(
            f"the CUDA kernels were built for {' '.join(built)}, none of which runs on {device} "
            f"({torch.cuda.get_device_name(device)}); put a newer nvcc on the PATH and "
            "install the package again: pip install ."
        )


def _runs_on(major: int, architecture: str) -> bool:
    """Machine code (sm_90) runs on its own major version, PTX (compute_100) from its version on."""
    kind, number = architecture.split("_")
    return int(number) // 10 == major if kind == "sm" else int(number) // 10 <= major


def _look_at_entry_points(facts: dict[str, str], problems: list[str]) -> None:
    facts["plug-in"] = f"--speculative-algorithm {ALGORITHM}"
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if allowed and "dflare" not in [name.strip() for name in allowed.split(",")]:
        facts["plug-in"] = "left out"
        problems.append(
            f"SGLANG_PLUGINS={allowed!r} leaves the plug-in out: name dflare in it, or unset it"
        )
    for group in ("sglang.srt.plugins", "sglang.srt.platforms"):
        if not any(entry.value.startswith("dflare.") for entry in entry_points(group=group)):
            facts["plug-in"] = "not installed"
            problems.append(
                f"the entry point in {group} is missing; install the package: pip install -e ."
            )


def _look_at_loaded_plugin(facts: dict[str, str], problems: list[str]) -> None:
    # SGLang announces every plug-in that it loads; here only the outcome matters.
    logging.getLogger("sglang").setLevel(logging.ERROR)
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins import load_plugins
    from sglang.srt.speculative.spec_registry import get_spec

    load_plugins()
    facts["platform"] = type(current_platform).__name__
    if get_spec(ALGORITHM) is None:
        facts["plug-in"] = "not registered"
        problems.append(
            f"SGLang did not register {ALGORITHM}; its log above says why the plug-in failed"
        )


def _look_at_demo(facts: dict[str, str]) -> None:
    from dflare.demo import TARGET_FOLDER, cache_folder, demo_draft

    target = cache_folder() / TARGET_FOLDER
    facts["demo target"] = str(target) if target.exists() else "not made yet; `make demo` makes it"
    try:
        facts["demo drafter"] = str(demo_draft())
    except DFlareError as error:
        facts["demo drafter"] = str(error)
