"""The CUDA operators on the host emulator: their launchers, their kernels, guarded tensors."""

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ctypes import c_char_p, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "emulation"
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-DDFLARE_EMULATION"]
# Hidden: libraries with different kernels are loaded side by side.
FLAGS += ["-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused"]
TORCH_FLAGS = [f"-isystem{path}" for path in cpp_extension.include_paths()]
TORCH_FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-O0", "-Wno-error"]
ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
MISSING = ""  # why there is no emulator here
if platform.machine() not in ("x86_64", "AMD64"):
    MISSING = "the emulator runs on x86-64 only"
elif shutil.which("g++") is None:
    MISSING = "g++ is not on the PATH"


class EmulationError(AssertionError):
    """What the emulator found wrong with a kernel."""


# ---------------------------------------------------------------- build


@dataclass(frozen=True)
class Plant:
    """A bug to plant: `before` becomes `after` in a file under csrc.

    The text must occur exactly once, or `which` says which of several occurrences is meant.
    """

    file: str
    before: str
    after: str
    which: int | None = None


def _source_tree(plants: tuple[Plant, ...]) -> Path:
    if not plants:
        return ROOT / "csrc"
    tree = CACHE / "planted" / hashlib.sha256(repr(plants).encode()).hexdigest()[:16]
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", tree, ignore=shutil.ignore_patterns("cpu", "gates"))
    for plant in plants:
        path = tree / plant.file
        pieces = path.read_text().split(plant.before)
        at = 1 if plant.which is None else plant.which + 1
        assert at < len(pieces) and (plant.which is not None or len(pieces) == 2), (
            f"{plant.file} holds {plant.before!r} {len(pieces) - 1} times: adapt the planted bug"
        )
        before, after = plant.before.join(pieces[:at]), plant.before.join(pieces[at:])
        path.write_text(before + plant.after + after)
    return tree


def _with_includes(path: Path, tree: Path, seen: set[Path]) -> str:
    """The text of a source file and of all that it includes from the tree."""
    if path in seen:
        return ""
    seen.add(path)
    text = path.read_text()
    for name in re.findall(r'#include ["<](.+)[">]', text):
        folders = (path.parent, tree / "emulation", tree / "cuda", tree)
        found = [folder / name for folder in folders if (folder / name).exists()]
        text += _with_includes(found[0].resolve(), tree, seen) if found else ""
    return text


def _unique(path: Path) -> Path:
    """A name to build under, so that concurrent test processes never see half a file."""
    return path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")


def _compile(tree: Path, source: Path, flags: list[str]) -> Path:
    text = _with_includes(source, tree, set())
    original = ROOT / "csrc"
    if source.is_relative_to(tree) and text != _with_includes(
        original / source.relative_to(tree), original, set()
    ):
        flags = ["-O1", *flags]  # a planted bug runs a few times: compiling it takes longer
    key = repr((FLAGS, flags, text))
    target = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.o"
    if not target.exists():
        folders = [f"-I{tree / name}" for name in ("emulation", "cuda", "")]
        command = ["g++", *FLAGS, *folders, *flags, "-x", "c++", "-c", str(source)]
        subprocess.run([*command, "-o", str(_unique(target))], check=True)
        _unique(target).rename(target)
    return target


KERNELS = ["cuda/fuse_norm.cu", "cuda/norm_rope_write.cu", "cuda/block_attention_schedule.cu"]
KERNELS += ["cuda/head_argmax.cu", "cuda/lookup_continuations.cu", "cuda/draft_tree.cu"]
KERNELS += ["cuda/dispatch.cpp"]
KERNELS += [
    f"emulation/{name}.cpp"
    for name in ("emulator", "scheduler", "hopper", "fiber", "guarded_memory")
]
OPERATORS = ("append_context_kv", "block_attention", "draft_tree", "head_argmax")
OPERATORS += ("lookup_continuations",)
LAUNCHERS = [*(f"cuda/launch_{name}.cpp" for name in OPERATORS), "emulation/entry.cpp"]
Shape = tuple[torch.dtype, int]  # element type and head size
SHAPES: list[Shape] = list(itertools.product(ELEMENTS, (64, 128, 256)))
INSTANTIATED = dict.fromkeys(("block_attention", "block_attention_wgmma"), "BlockAttention")
INSTANTIATED |= dict.fromkeys(("kv_project_write", "kv_project_wgmma"), "KvProjectWrite")


def _others(wanted: Shape) -> Path:
    """A source file that refuses the calls of all instantiations but one: none is compiled."""
    lines = ['#include "params.h"', "namespace dflare {"]
    for kernel, params in INSTANTIATED.items():
        signature = f"run_{kernel}{{}}(const {params}Params&, cudaStream_t)"
        lines.append(f"template <class T, int> cudaError_t {signature.format('')};")
        for dtype, size in SHAPES:
            if (dtype, size) != wanted:
                name = signature.format(f"<{ELEMENTS[dtype]}, {size}>")
                lines.append(f"template <> cudaError_t {name} {{ return cudaErrorInvalidValue; }}")
    path = CACHE / f"all_but_{ELEMENTS[wanted[0]]}_{wanted[1]}.cpp"
    text = "\n".join([*lines, "}"])
    if not path.exists() or path.read_text() != text:
        _unique(path).write_text(text)
        _unique(path).rename(path)
    return path


def build(wanted: Shape | None, plants: tuple[Plant, ...] = ()) -> Path:
    """Launchers, and the kernels of one element type and head size, or of all.

    Compiles what has changed, two files at a time.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    tree = _source_tree(plants)
    jobs: list[tuple[Path, list[str]]] = [(tree / source, TORCH_FLAGS) for source in LAUNCHERS]
    jobs += [(tree / source, []) for source in KERNELS]
    for kernel, (dtype, size) in itertools.product(INSTANTIATED, [wanted] if wanted else SHAPES):
        name = f"{kernel}_{ELEMENTS[dtype].lower()}_{size}.cu"
        if (tree / "cuda/instantiations" / name).exists():  # not every kernel has all head sizes
            jobs.append((tree / "cuda/instantiations" / name, []))
    if wanted:
        jobs.append((_others(wanted), []))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _compile(tree, *job), jobs))
    names = "".join(sorted(path.name for path in objects))
    library = CACHE / f"{hashlib.sha256(names.encode()).hexdigest()[:24]}.so"
    if not library.exists():
        torch_library = (f"-L{cpp_extension.library_paths()[0]}", "-ltorch_cpu")
        command = ["g++", "-shared", *map(str, objects), *torch_library]
        subprocess.run([*command, "-o", str(_unique(library))], check=True)
        _unique(library).rename(library)
    return library


# ---------------------------------------------------------------- calls


class Counters(NamedTuple):
    """What a launch asked of the memories (`Counters` of csrc/emulation/emulator.h)."""

    matrix_loads: int
    matrix_load_wavefronts: int
    copies: int
    copy_wavefronts: int
    sectors: int
    copied_bytes: int
    prefetched_bytes: int
    bytes_in_flight: int
    l2_bytes: int
    block_l2_bytes: int
    cluster_bytes: int


class Emulator:
    """The launchers, and the kernels of one element type and head size, or of all.

    While `installed`, `torch.ops.dflare.*` on CPU tensors is what it is on CUDA elsewhere; while
    `queue` is open, kernels wait, as on a stream, and tensors that `put` has placed are guarded.
    """

    def __init__(self, wanted: Shape | None, plants: tuple[Plant, ...]) -> None:
        library = ctypes.CDLL(str(build(wanted, plants)))
        library.emu_allocate.restype = c_void_p
        library.emu_allocate.argtypes = [c_size_t, c_char_p]
        library.emu_release.argtypes = [c_void_p]
        library.emu_produce.argtypes = [c_void_p, c_void_p, c_size_t]
        library.emu_open_queue.argtypes = [c_uint64]
        library.emu_run_queue.restype = c_char_p
        self.library = library
        self._addresses: list[int] = []
        self._sources: list[Tensor] = []  # that queued kernels read
        self._seed = 0

    @contextmanager
    def installed(
        self, sm_count: int = 16, shared_kib: int = 228, capability: int = 9
    ) -> Iterator[None]:
        """Puts the operators on an emulated device."""
        self.library.emu_install(sm_count, shared_kib << 10, capability)
        try:
            yield
        finally:
            self.library.emu_uninstall()

    @contextmanager
    def queue(self, seed: int, sm_count: int = 4) -> Iterator[None]:
        """Kernels wait for `wait`, to run with the thread schedule that the seed draws.

        What was placed or returned meanwhile is gone afterwards.
        """
        self._seed = seed
        with self.installed(sm_count):
            self.library.emu_open_queue(seed)
            try:
                yield
            finally:
                self.library.emu_close_queue()
                for address in self._addresses:
                    self.library.emu_release(address)
                self._addresses.clear()
                self._sources.clear()

    def put(self, name: str, source: Tensor, *, late: bool = False) -> Tensor:
        """A guarded copy with the same strides.

        Args:
            name: for errors.
            source: what to copy.
            late: the copy is the work of a kernel that is queued, the one before an operator's.
        """
        if not source.numel():
            return source.clone()
        last = sum((n - 1) * s for n, s in zip(source.shape, source.stride(), strict=True))
        count, size = last + 1, (last + 1) * source.itemsize
        address = self.library.emu_allocate(size, name.encode())
        if address is None:
            raise MemoryError(f"{name}: no {size} bytes")
        self._addresses.append(address)
        buffer = (ctypes.c_char * size).from_address(address)
        flat = torch.frombuffer(buffer, dtype=source.dtype, count=count)
        target = flat.as_strided(source.shape, source.stride())
        if late:
            self._sources.append(source)
            self.library.emu_produce(address, source.data_ptr(), count * source.itemsize)
            return target
        return target.copy_(source)

    def wait(self) -> None:
        """Runs all queued kernels.

        Raises:
            EmulationError: one of them did what it must not.
        """
        error = self.library.emu_run_queue()
        if error is not None:
            raise EmulationError(f"{error.decode()} (seed {self._seed})")

    def counters(self, launch: int) -> Counters:
        """Of a launch of the last run, counted from 0, stand-ins of kernels included."""
        out = (c_int64 * 11)()
        self.library.emu_counters(c_size_t(launch), out)
        return Counters(*out)


@functools.cache
def emulator(
    dtype: torch.dtype | None = None, head_dim: int = 0, plants: tuple[Plant, ...] = ()
) -> Emulator:
    """Built once, and loaded once in a process; for all element types and head sizes by default."""
    return Emulator((dtype, head_dim) if dtype else None, plants)
