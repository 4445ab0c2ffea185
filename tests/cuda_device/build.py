"""Builds the test device's libraries; every object is cached by what it is made of."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "cuda_device"
CPP = ["g++", "-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Werror"]
C = ["gcc", "-O1", "-fPIC", "-w"]  # stubs of builtin names warn
MODULE = "dflare_test_device"


@dataclass(frozen=True)
class Libraries:
    """What `cuda_device.load` loads, in this order, and the folder of the extension module."""

    runtime: Path
    driver: Path
    module_folder: Path


def build() -> Libraries:
    """Compiles what has changed.

    Raises:
        RuntimeError: something that the build needs is missing, or a file does not compile.
    """
    for program in ("g++", "gcc", "nm"):
        if shutil.which(program) is None:
            raise RuntimeError(f"the CUDA device for tests is built with {program}: not on PATH")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        toolkit = _Toolkit.find()
        runtime = _build_runtime(toolkit)
        driver = _build_driver(toolkit)
        return Libraries(runtime, driver, _build_module(toolkit, runtime))


@dataclass(frozen=True)
class _Toolkit:
    """The CUDA runtime that torch was installed with: its library and its headers."""

    library: Path
    include: Path

    @classmethod
    def find(cls) -> "_Toolkit":
        spec = importlib.util.find_spec("nvidia")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for library in sorted(Path(folder).glob("*/lib/libcudart.so.*")):
                include = library.parents[1] / "include"
                if (include / "cuda_runtime_api.h").exists():
                    return cls(library, include)
        raise RuntimeError(
            "the CUDA device for tests stands in for the libcudart.so that a CUDA build of torch "
            "brings along (package nvidia-cuda-runtime): none is installed beside torch"
        )


def _build_runtime(toolkit: _Toolkit) -> Path:
    sources = sorted((HERE / "runtime").glob("*.cpp"))
    objects = _compile_all([[*CPP, f"-I{toolkit.include}", "-c", str(path)] for path in sources])
    provided = _symbols(["nm", "--defined-only", *map(str, objects)])
    wanted = _symbols(["nm", "-D", "--defined-only", str(toolkit.library)])
    stubs = "#include <stdio.h>\n" + "".join(
        f"int {name}(void) {{"
        f' fprintf(stderr, "test device: {name} is not there\\n"); return 801; }}\n'
        for name in sorted(wanted - provided)
        if re.match(r"(__)?cuda", name)
    )
    exports = CACHE / "exports.map"
    exports.write_text(
        f'{toolkit.library.name} {{ global: cuda*; __cuda*; extern "C++" {{ testdevice::*; }};'
        " local: *; };\n"
    )
    flags = [f"-Wl,--version-script={exports}", f"-Wl,-soname,{toolkit.library.name}"]
    return _link([*objects, _compile_text(stubs)], toolkit.library.name, flags)


def _build_driver(toolkit: _Toolkit) -> Path:
    header = (toolkit.include / "cuda.h").read_text()
    declared = set(re.findall(r"\b(cu[A-Z]\w+) *\(", header))
    declared |= set(re.findall(r"#define +cu[A-Z]\w+ +(?:\w+\()?(cu[A-Z]\w+)", header))
    declared |= {"cuGetProcAddress_v2", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"}
    [driver] = _compile_all([[*C, "-c", str(HERE / "runtime/driver.c")]])
    missing = sorted(declared - _symbols(["nm", "--defined-only", str(driver)]))
    stubs = "".join(f"int {name}(void) {{ return 801; }}\n" for name in missing)
    return _link([driver, _compile_text(stubs)], "libcuda.so.1", ["-Wl,-soname,libcuda.so.1"])


def _build_module(toolkit: _Toolkit, runtime: Path) -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("the CUDA device for tests needs torch: it is not installed")
    torch = Path(spec.origin).parent
    if not (torch / "lib/libtorch_cuda.so").exists():
        raise RuntimeError("the CUDA device for tests needs a CUDA build of torch; this is another")
    includes = [torch / "include", torch / "include/torch/csrc/api/include", toolkit.include]
    flags = [f"-DTORCH_EXTENSION_NAME={MODULE}", "-D_GLIBCXX_USE_CXX11_ABI=1"]
    flags += [f"-isystem{path}" for path in [*includes, sysconfig.get_path("include")]]
    sources = sorted((HERE / "aten").glob("*.cpp"))
    objects = _compile_all([[*CPP, *flags, "-c", str(path)] for path in sources])
    libraries = ["c10", "torch", "torch_cpu", "torch_cuda", "c10_cuda", "torch_python"]
    link = [f"-L{torch / 'lib'}", *(f"-l{name}" for name in libraries), str(runtime)]
    return _link(objects, MODULE + str(sysconfig.get_config_var("EXT_SUFFIX")), link).parent


# ---------------------------------------------------------------- the cache


def _compile_all(commands: list[list[str]]) -> list[Path]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(_compile, commands))


def _compile(command: list[str]) -> Path:
    target = CACHE / f"{_digest(repr(command), _with_includes(Path(command[-1]), set()))}.o"
    if not target.exists():
        _run([*command, "-o", str(target.with_suffix(".part"))])
        target.with_suffix(".part").rename(target)
    return target


def _compile_text(text: str) -> Path:
    source = CACHE / f"{_digest(text)}.c"
    source.write_text(text)
    return _compile([*C, "-c", str(source)])


def _link(objects: list[Path], name: str, flags: list[str]) -> Path:
    parts = [*(path.name for path in objects), *flags]
    target = CACHE / _digest(*parts) / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        part = target.with_suffix(".part")
        _run(["g++", "-shared", *map(str, objects), *flags, "-o", str(part)])
        part.rename(target)
    return target


def _with_includes(path: Path, seen: set[Path]) -> str:
    """The text of a source file and of the files of this folder that it includes."""
    if path in seen:
        return ""
    seen.add(path)
    text = path.read_text()
    for name in re.findall(r'#include "(.+)"', text):
        text += _with_includes((path.parent / name).resolve(), seen)
    return text


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _symbols(command: list[str]) -> set[str]:
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return set(re.findall(r" T (\w+)", listing))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LANG": "C"})
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
