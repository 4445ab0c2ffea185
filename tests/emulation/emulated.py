"""Builds the CUDA kernels for the host emulator and calls them on guarded tensors."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "emulation"
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-DDFLARE_EMULATION"]
# Hidden: libraries with different kernels are loaded side by side.
FLAGS += ["-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused"]
ELEMENTS = {torch.bfloat16: (0, "Bf16"), torch.float16: (1, "Fp16")}
MAX_LAYERS = 16


class EmulationError(AssertionError):
    """What the emulator found wrong with a kernel."""


# ---------------------------------------------------------------- parameters (csrc/cuda/params.h)


class FuseNormParams(ctypes.Structure):
    _fields_ = [
        ("element", c_int),
        ("target_hidden", c_void_p),
        ("target_hidden_stride", c_int64),
        ("probs", c_void_p),
        ("norm_weight", c_void_p),
        ("eps", c_float),
        ("commit_lens", c_void_p),
        ("num_rows", c_int),
        ("block_size", c_int),
        ("num_taps", c_int),
        ("num_layers", c_int),
        ("hidden", c_int),
        ("fused", c_void_p),
        ("compact_rows", c_void_p),
        ("tokens_ahead", c_int),
        ("overlap_launch", c_bool),
    ]


class ContextKvOutput(ctypes.Structure):
    _fields_ = [
        ("kv_bias", c_void_p),
        ("k_norm_weight", c_void_p),
        ("k_norm_eps", c_float),
        ("cos_sin", c_void_p),
        ("rotary", c_int),
        ("positions", c_void_p),
        ("cache_loc", c_void_p),
        ("compact_rows", c_void_p),
        ("num_rows", c_int),
        ("num_layers", c_int),
        ("kv_heads", c_int),
        ("k_pools", c_void_p * MAX_LAYERS),
        ("v_pools", c_void_p * MAX_LAYERS),
        ("k_strides", c_int * MAX_LAYERS),
        ("v_strides", c_int * MAX_LAYERS),
    ]


class KvProjectWriteParams(ctypes.Structure):
    _fields_ = [
        ("element", c_int),
        ("head_dim", c_int),
        ("hidden", c_int),
        ("fused", c_void_p),
        ("kv_weight", c_void_p),
        ("overlap_launch", c_bool),
        ("out", ContextKvOutput),
    ]


class NormRopeWriteParams(ctypes.Structure):
    _fields_ = [
        ("element", c_int),
        ("head_dim", c_int),
        ("kv", c_void_p),
        ("out", ContextKvOutput),
    ]


class AttentionPlan(ctypes.Structure):
    _fields_ = [
        ("group", c_int),
        ("inverse_group", c_int),
        ("warps", c_int),
        ("row_tiles", c_int),
        ("units", c_int),
        ("wave_items", c_int),
        ("max_items", c_int),
        ("max_partials", c_int),
    ]


class AttentionScheduleParams(ctypes.Structure):
    _fields_ = [
        ("seq_lens", c_void_p),
        ("seq_lens_64bit", c_bool),
        ("batch_size", c_int),
        ("head_dim", c_int),
        ("window", c_int),
        ("plan", AttentionPlan),
        ("schedule", c_void_p),
    ]


class BlockAttentionParams(ctypes.Structure):
    _fields_ = [
        ("element", c_int),
        ("qkv", c_void_p),
        ("qkv_stride", c_int),
        ("q_norm_weight", c_void_p),
        ("k_norm_weight", c_void_p),
        ("eps", c_float),
        ("cos_sin", c_void_p),
        ("positions", c_void_p),
        ("k_pool", c_void_p),
        ("v_pool", c_void_p),
        ("k_stride", c_int),
        ("v_stride", c_int),
        ("req_to_token", c_void_p),
        ("req_to_token_stride", c_int64),
        ("req_pool_indices", c_void_p),
        ("seq_lens", c_void_p),
        ("seq_lens_64bit", c_bool),
        ("batch_size", c_int),
        ("rotary", c_int),
        ("block_size", c_int),
        ("num_heads", c_int),
        ("kv_heads", c_int),
        ("head_dim", c_int),
        ("window", c_int),
        ("causal", c_bool),
        ("scale", c_float),
        ("plan", AttentionPlan),
        ("schedule", c_void_p),
        ("partials", c_void_p),
        ("out", c_void_p),
        ("overlap_launch", c_bool),
    ]


class LookupParams(ctypes.Structure):
    _fields_ = [
        ("tokens", c_void_p),
        ("req_to_token", c_void_p),
        ("req_to_token_stride", c_int64),
        ("req_pool_indices", c_void_p),
        ("seq_lens", c_void_p),
        ("seq_lens_64bit", c_bool),
        ("anchors", c_void_p),
        ("batch_size", c_int),
        ("count", c_int),
        ("least_match", c_int),
        ("longest_match", c_int),
        ("found", c_void_p),
        ("lengths", c_void_p),
    ]


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


def _source_tree(plant: Plant | None) -> Path:
    if plant is None:
        return ROOT / "csrc"
    tree = CACHE / "planted" / hashlib.sha256(repr(plant).encode()).hexdigest()[:16]
    shutil.rmtree(tree, ignore_errors=True)
    for folder in ("cuda", "emulation"):
        shutil.copytree(ROOT / "csrc" / folder, tree / folder)
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


def _compile(tree: Path, source: Path, flags: tuple[str, ...] = ()) -> Path:
    key = repr((FLAGS, flags, _with_includes(source, tree, set())))
    target = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.o"
    if not target.exists():
        command = ["g++", *FLAGS, f"-I{tree / 'emulation'}", *flags, "-x", "c++"]
        subprocess.run([*command, "-c", str(source), "-o", str(_unique(target))], check=True)
        _unique(target).rename(target)
    return target


def _link(tree: Path, jobs: list[tuple], flags: tuple[str, ...] = ()) -> Path:
    """Compiles what has changed, two files at a time, and links; the library's path."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _compile(tree, *job), jobs))
    names = "".join(sorted(path.name for path in objects))
    library = CACHE / f"{hashlib.sha256(names.encode()).hexdigest()[:24]}.so"
    if not library.exists():
        command = ["g++", "-shared", *map(str, objects), *flags, "-o", str(_unique(library))]
        subprocess.run(command, check=True)
        _unique(library).rename(library)
    return library


RUNTIME = [f"emulation/{name}.cpp" for name in ("emulator", "scheduler", "fiber", "guarded_memory")]
KERNELS = [
    "cuda/fuse_norm.cu",
    "cuda/norm_rope_write.cu",
    "cuda/block_attention_schedule.cu",
    "cuda/lookup_continuations.cu",
]


def build(dtype: torch.dtype, head_dim: int, plant: Plant | None = None) -> Path:
    """The kernels of one element type and head size with a C interface."""
    CACHE.mkdir(parents=True, exist_ok=True)
    tree = _source_tree(plant)
    element = ELEMENTS[dtype][1]
    instantiations = [
        f"cuda/instantiations/{kernel}_{element.lower()}_{head_dim}.cu"
        for kernel in ("block_attention", "kv_project_write")
    ]
    jobs: list[tuple] = [(tree / source,) for source in [*instantiations, *KERNELS, *RUNTIME]]
    entry = (f"-DDFLARE_EMULATED_ELEMENT={element}", f"-DDFLARE_EMULATED_HEAD_DIM={head_dim}")
    return _link(tree, [*jobs, (tree / "emulation/entry.cpp", entry)])


def build_launchers() -> Path:
    """All kernels behind their Torch launchers, as torch.ops.dflare_emulated.* on the CPU."""
    tree, generated = ROOT / "csrc", CACHE / "launchers"
    generated.mkdir(parents=True, exist_ok=True)
    launchers = [tree / "ops.cpp", *sorted((tree / "cuda").glob("launch_*.cpp"))]
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    (generated / "build_info.h").write_text('#define DFLARE_BUILD_INFO "{}"\n')
    oldest_torch = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
    flags = (f"-I{tree / 'cuda'}", f"-I{tree}", *includes, oldest_torch, "-O0", "-Wno-error")
    jobs: list[tuple] = []
    for source in launchers:
        text = source.read_text().replace("(dflare, CUDA, m)", "(dflare_emulated, CPU, m)")
        copy = generated / source.name
        # Everything: an implementation left in place would take that of the real library.
        copy.write_text(text.replace("(dflare, ", "(dflare_emulated, "))
        jobs.append((copy, flags))
    instantiations = sorted((tree / "cuda/instantiations").glob("*.cu"))
    jobs += [(path,) for path in instantiations]
    jobs += [(tree / source,) for source in [*KERNELS, *RUNTIME, "cuda/dispatch.cpp"]]
    libraries = (f"-L{cpp_extension.library_paths()[0]}", "-ltorch_cpu")
    return _link(tree, jobs, libraries)


# ---------------------------------------------------------------- calls


class Memory:
    """Guarded tensors; all of them are released together."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._addresses: list[int] = []

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of all ones bits: NaN, or -1."""
        count = int(torch.Size(shape).numel())
        size = max(count * dtype.itemsize, 1)
        address = self._library.emu_allocate(size, name.encode())
        if address is None:
            raise MemoryError(f"{name}: no {size} bytes")
        self._addresses.append(address)
        buffer = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)

    def copy(self, name: str, source: Tensor) -> Tensor:
        target = self.empty(name, tuple(source.shape), source.dtype)
        return target.copy_(source)

    def release(self) -> None:
        for address in self._addresses:
            self._library.emu_release(address)


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


class Emulator:
    """The kernels of one element type and head size."""

    def __init__(self, dtype: torch.dtype, head_dim: int, plant: Plant | None = None) -> None:
        self.dtype, self.head_dim = dtype, head_dim
        self.element = ELEMENTS[dtype][0]
        library = ctypes.CDLL(str(build(dtype, head_dim, plant)))
        library.emu_allocate.restype = c_void_p
        library.emu_allocate.argtypes = [c_size_t, c_char_p]
        library.emu_release.argtypes = [c_void_p]
        library.emu_produce.argtypes = [c_void_p, c_void_p, c_size_t]
        library.emu_synchronize.restype = c_char_p
        library.emu_synchronize.argtypes = [ctypes.c_uint64]
        library.emu_plan_attention.restype = AttentionPlan
        for function in ("schedule", "partials"):
            size_of = getattr(library, f"emu_attention_{function}_size")
            size_of.restype = c_int64
            size_of.argtypes = [POINTER(AttentionPlan)]
        library.emu_size_of.restype = c_size_t
        mirrored = [
            FuseNormParams,
            KvProjectWriteParams,
            NormRopeWriteParams,
            AttentionScheduleParams,
            BlockAttentionParams,
            LookupParams,
        ]
        for which, struct in enumerate(mirrored):
            expected = library.emu_size_of(which)
            assert ctypes.sizeof(struct) == expected, f"{struct.__name__} differs from params.h"
        self.library = library

    @contextmanager
    def memory(self) -> Iterator[Memory]:
        memory = Memory(self.library)
        try:
            yield memory
        finally:
            memory.release()

    def launch(self, kernel: str, params: ctypes.Structure) -> None:
        """Queues a kernel; `synchronize` runs it."""
        status = getattr(self.library, f"emu_{kernel}")(byref(params))
        assert status == 0, f"{kernel}: launch refused"

    def produce(self, target: Tensor, source: Tensor) -> None:
        """Queues a kernel that copies `source` to `target`, late: the one before an operator's."""
        size = target.numel() * target.itemsize
        self.library.emu_produce(target.data_ptr(), source.data_ptr(), size)

    def synchronize(self, seed: int) -> None:
        """Runs all queued kernels with the thread schedule that the seed draws."""
        error = self.library.emu_synchronize(seed)
        if error is not None:
            raise EmulationError(f"{error.decode()} (seed {seed})")

    def counters(self, launch: int) -> Counters:
        """Of a launch of the last `synchronize`, counted from 0, stand-ins of kernels included."""
        out = (c_int64 * 8)()
        self.library.emu_counters(c_size_t(launch), out)
        return Counters(*out)

    def plan_attention(
        self, batch: int, block: int, heads: int, kv_heads: int, sm_count: int, shared: int
    ) -> AttentionPlan:
        return self.library.emu_plan_attention(batch, block, heads, kv_heads, sm_count, shared)

    def schedule_size(self, plan: AttentionPlan) -> int:
        return self.library.emu_attention_schedule_size(byref(plan))

    def partials_size(self, plan: AttentionPlan) -> int:
        return self.library.emu_attention_partials_size(byref(plan))


@functools.cache
def emulator(dtype: torch.dtype, head_dim: int) -> Emulator:
    """The unchanged kernels, built once."""
    return Emulator(dtype, head_dim)
