"""Compiles what FlashInfer compiles at its first use, where there is an nvcc and no GPU.

    python -m bench.kernels.prebuild MODULES [--arch 9.0a] [--head-dim 128]

MODULES/NAME/NAME.so is left for each module of the `flashinfer_*` arms in bf16. On the machine with
the GPU, `FLASHINFER_MODULES=MODULES` makes the benchmark load them, and nothing is compiled.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

BACKENDS = {"8": ("fa2",), "9": ("fa2", "fa3"), "10": ("fa2",), "12": ("fa2",)}


def module(backend: str, head_dim: int) -> Any:
    """FlashInfer's description of what a paged prefill of this backend loads, pools alike."""
    import torch
    from flashinfer.jit import gen_batch_prefill_module
    from flashinfer.jit.attention.modules import _gen_batch_prefill_primary_module

    make = _gen_batch_prefill_primary_module if backend == "fa2" else gen_batch_prefill_module
    dtypes = (*(torch.bfloat16,) * 3, torch.int32)
    return make(backend, *dtypes, head_dim, head_dim, 0, False, False, False)


def use_prebuilt(folder: Path) -> None:
    """Make FlashInfer load a folder's modules; it looks for NAME/NAME.so where it has its own."""
    from flashinfer.jit import env

    env.FLASHINFER_AOT_DIR = folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="9.0a", help="compute capability, with its suffix")
    parser.add_argument("--head-dim", type=int, default=128)
    arguments = parser.parse_args()
    major = arguments.arch.split(".")[0]
    if major not in BACKENDS:
        parser.error(f"--arch {arguments.arch}: expected one of {', '.join(BACKENDS)} before the .")
    with tempfile.TemporaryDirectory() as scratch:
        # Read when FlashInfer is imported.
        os.environ |= {
            "FLASHINFER_CUDA_ARCH_LIST": arguments.arch,
            "FLASHINFER_WORKSPACE_BASE": scratch,
        }
        for backend in BACKENDS[major]:
            built = module(backend, arguments.head_dim)
            built.build()
            target = arguments.folder / built.name / f"{built.name}.so"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(built.get_library_path(), target)
            print(target, f"{target.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
