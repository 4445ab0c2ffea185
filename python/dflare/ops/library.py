"""Loads libdflare_ops.so, which registers the operators under `torch.ops.dflare`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dflare.errors import DFlareError, UnsupportedError

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "libdflare_ops.so"
_NEWEST = "decoder_layers"  # the operator that a library which was built before does not have
_BUILD_COMMAND = "pip install . (in the root of the repository)"

# What the CUDA operators take; the same numbers as in csrc/cuda/heuristics.h.
MAX_LAYERS, MAX_TAPS, MAX_HIDDEN, MAX_BLOCK, MAX_QUERY_ROWS = 16, 32, 8192, 32, 1024


class OperatorLibraryError(DFlareError, ImportError):
    """The operator library is missing or does not fit the installed torch."""


def load_library(path: Path = LIBRARY_PATH) -> None:
    """Registers the operators of the library at `path` with torch.

    Raises:
        OperatorLibraryError: the file is missing, or was built for another torch.
    """
    if not path.is_file():
        raise OperatorLibraryError(
            f"the operator library {path} does not exist; build it with: {_BUILD_COMMAND}"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise OperatorLibraryError(
            f"the operator library {path} does not load in torch {torch.__version__} ({error}); "
            f"it was likely built for another torch: rebuild it with: {_BUILD_COMMAND}"
        ) from error


def build_info() -> dict[str, Any]:
    """What the loaded library was built from.

    Returns:
        `version`, `torch`, `compiler` and `nvcc` by version; `cpu_isas`: instruction sets;
        `cuda_archs`: sm_* of machine code and compute_* of PTX, empty for a CPU-only library;
        `cuda_missing`: why it is one, else empty.
    """
    return json.loads(torch.ops.dflare.build_info())


def check_kernels_for(device: torch.device) -> None:
    """Make sure that the library has kernels for a device, whatever the drafter.

    Raises:
        OperatorLibraryError: it was built from older sources, or without CUDA, or the GPU is too
            old for it.
    """
    if not hasattr(torch.ops.dflare, _NEWEST):
        raise OperatorLibraryError(
            f"the operator library {LIBRARY_PATH} has no operator {_NEWEST}: it was built from "
            f"older sources; rebuild it with: {_BUILD_COMMAND}"
        )
    if device.type != "cuda":
        return
    if not torch._C._dispatch_has_kernel_for_dispatch_key("dflare::block_attention", "CUDA"):
        raise OperatorLibraryError(
            f"{LIBRARY_PATH.name} was built without CUDA kernels ({build_info()['cuda_missing']}), "
            f"but the device is {device}; install the package again with nvcc on the PATH, in "
            "$CUDA_HOME or beside torch (SGLang brings nvidia-cuda-nvcc): "
            f"DFLARE_CUDA=require {_BUILD_COMMAND}"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise OperatorLibraryError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; the "
            "CUDA kernels need 8.0 or later (A100, H100, B200 and their relatives): use another "
            "GPU, or serve on a CPU"
        )


def check_support(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Makes sure that there are kernels for a drafter, before anything is launched.

    Args:
        device: that the drafter runs on.
        dtype: of its weights and K/V pools.
        head_dim: elements of an attention head.

    Raises:
        OperatorLibraryError: the library was built without CUDA, or for other GPUs.
        UnsupportedError: no kernel takes this dtype or head size.
    """
    check_kernels_for(device)
    cuda = device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float16) if cuda else (torch.bfloat16, torch.float32)
    if dtype not in dtypes:
        names = " and ".join(str(each).removeprefix("torch.") for each in dtypes)
        raise UnsupportedError(
            f"the drafter runs in {str(dtype).removeprefix('torch.')}; on {device.type} there are "
            f"kernels for {names}: pass --dtype {str(dtypes[0]).removeprefix('torch.')}"
        )
    if cuda and head_dim not in (64, 128, 256):
        raise UnsupportedError(
            f"the drafter has head_dim {head_dim}; the CUDA kernels take 64, 128 and 256. Serve "
            "this drafter on a CPU, or train one with another head_dim"
        )
    if not cuda and head_dim % 16 != 0:
        raise UnsupportedError(
            f"the drafter has head_dim {head_dim}; the CPU kernels take multiples of 16: train one "
            "with another head_dim"
        )


@dataclass(frozen=True)
class DrafterSizes:
    """The sizes of a drafter that the CUDA kernels have limits for.

    Attributes:
        layers: D. taps: T. hidden: H. block: B.
        rotary: columns of the RoPE table.
        group: query heads of a KV head.
    """

    layers: int
    taps: int
    hidden: int
    rotary: int
    block: int
    group: int


def check_sizes(device: torch.device, sizes: DrafterSizes) -> None:
    """Makes sure that the kernels take a drafter's sizes; on a CPU they take all of these.

    Raises:
        UnsupportedError: one message with every size beyond its limit.
    """
    if device.type != "cuda":
        return
    limits = (
        (sizes.layers <= MAX_LAYERS, f"{sizes.layers} layers, expected at most {MAX_LAYERS}"),
        (sizes.taps <= MAX_TAPS, f"{sizes.taps} taps, expected at most {MAX_TAPS}"),
        (
            sizes.hidden % 8 == 0 and sizes.hidden <= MAX_HIDDEN,
            f"hidden size {sizes.hidden}, expected a multiple of 8 of at most {MAX_HIDDEN}",
        ),
        (
            sizes.rotary % 16 == 0,
            f"{sizes.rotary} rotated dimensions a head, expected a multiple of 16",
        ),
        (sizes.block <= MAX_BLOCK, f"block size {sizes.block}, expected at most {MAX_BLOCK}"),
        (
            sizes.group * sizes.block <= MAX_QUERY_ROWS,
            f"{sizes.group} query heads a KV head in blocks of {sizes.block}, expected a product "
            f"of at most {MAX_QUERY_ROWS}",
        ),
    )
    if beyond := [text for fits, text in limits if not fits]:
        raise UnsupportedError(
            "the CUDA kernels do not take this drafter. It has "
            + "; it has ".join(beyond)
            + ". Serve it on a CPU, or train one within these limits"
        )
