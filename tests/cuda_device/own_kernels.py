"""The project's CUDA operators on the test device: their own launch code, run by the emulator.

csrc/cuda is compiled by the host's compiler against the emulator (csrc/emulation) for device code
and against the real runtime's headers for host code. So `cudaFuncSetAttribute`,
`cudaLaunchKernelEx` with its attributes and `c10::cuda`'s streams are the real calls; they arrive
in the test device, which checks them as a GPU would and queues the kernel for the emulator.
"""

import hashlib
from pathlib import Path

from . import load
from .build import HERE, Toolkit, build, cache_lock, torch_includes, torch_libraries
from .compiler import CACHE, ROOT, compile_all, link

_OPS = (
    "append_context_kv",
    "block_attention",
    "block_attention_schedule",
    "build_draft_tree",
    "head_argmax",
    "lookup_continuations",
    "walk_draft_tree",
    "write_tree_mask",
)
_FLAGS = ["-std=c++20", "-O2", "-march=native", "-fPIC", "-DDFLARE_EMULATION"]
_FLAGS += ["-fvisibility=hidden", "-Wno-unknown-pragmas", "-x", "c++"]
CSRC = ROOT / "csrc"
_EMULATOR = [p for p in sorted((CSRC / "emulation").glob("*.cpp")) if p.name != "entry.cpp"]


def build_kernels() -> Path:
    """The library with torch.ops.dflare_launched.*."""
    toolkit, runtime = Toolkit.find(), build().runtime
    with cache_lock():
        # torch's headers before the emulator's, which has stand-ins for some of them.
        torch = [flag.replace("-isystem", "-I") for flag in torch_includes(toolkit)]
        # The oldest torch, as in CMakeLists.txt.
        torch += [f"-I{CSRC}", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
        sources = [*sorted((CSRC / "cuda").rglob("*.cu")), CSRC / "cuda/dispatch.cpp"]
        commands = [[*_compiler(toolkit), str(path)] for path in [*sources, *_EMULATOR]]
        commands += [[*_compiler(toolkit, torch), str(path)] for path in _launchers()]
        objects = compile_all(commands, _headers())
        # As in CMakeLists.txt: the launchers' weak symbol must not be what decides.
        libraries = ["-Wl,--no-as-needed", *torch_libraries(), str(runtime)]
        return link(objects, "libdflare_launched.so", libraries)


def build_probe(launch: str) -> Path:
    """kernels/probe.cpp with the emulator, launched by this text of csrc/cuda/launch.cuh."""
    toolkit, runtime = Toolkit.find(), build().runtime
    with cache_lock():
        folder = CACHE / f"probe-{hashlib.sha256(launch.encode()).hexdigest()[:16]}"
        folder.mkdir(exist_ok=True)
        (folder / "launch.cuh").write_text(launch)
        probe = [*_compiler(toolkit, [f"-I{folder}"]), str(HERE / "kernels/probe.cpp")]
        objects = compile_all([probe], _headers() + launch)
        objects += compile_all([[*_compiler(toolkit), str(path)] for path in _EMULATOR], _headers())
        return link(objects, "libprobe.so", [str(runtime)])


def _compiler(toolkit: Toolkit, includes: list[str] | None = None) -> list[str]:
    own = [f"-I{path}" for path in (HERE / "kernels", CSRC / "emulation", CSRC / "cuda")]
    return ["g++", *(includes or []), *_FLAGS, *own, f"-isystem{toolkit.include}", "-c"]


def _headers() -> str:
    headers = [*(CSRC / "cuda").glob("*.*h"), *(CSRC / "emulation").glob("*.h")]
    headers += (CSRC / "contract").glob("*.h")
    headers += [*(HERE / "kernels").glob("*.h"), HERE / "runtime/device.h"]
    return "".join(path.read_text() for path in sorted(headers))


def _launchers() -> list[Path]:
    """Schemas and launchers in a namespace of their own, beside those of libdflare_ops.so."""
    folder = CACHE / "launchers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build_info.h").write_text('#define DFLARE_BUILD_INFO "{}"\n')
    copies = []
    for source in [CSRC / "ops.cpp", *sorted((CSRC / "cuda").glob("launch_*.cpp"))]:
        text = source.read_text().replace("(dflare, ", "(dflare_launched, ")
        copy = folder / source.name
        copy.write_text(text)
        copies.append(copy)
    return copies


def load_kernels() -> None:
    """Makes torch.ops.dflare.* work on the device."""
    import torch

    import dflare.ops  # noqa: F401 - the schemas

    torch.ops.load_library(str(build_kernels()))
    for name in _OPS:
        load().launch_op(f"dflare::{name}", "", f"dflare_launched::{name}")
