"""Builds the test device's libraries; what they are made of stands in README.md."""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from .compiler import CACHE, compile_all, compile_text, link

HERE = Path(__file__).parent
CPP = ["g++", "-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Werror"]
C = ["gcc", "-O1", "-fPIC", "-w"]  # stubs of builtin names warn
MODULE = "dflare_test_device"


@dataclass(frozen=True)
class Libraries:
    """What `cuda_device.load` loads, in this order, and the folder of the extension module."""

    runtime: Path
    driver: Path
    module_folder: Path


@contextmanager
def cache_lock() -> Iterator[None]:
    """Concurrent test processes build one after the other."""
    for program in ("g++", "gcc", "nm"):
        if shutil.which(program) is None:
            raise RuntimeError(f"the CUDA device for tests is built with {program}: not on PATH")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        yield


def build() -> Libraries:
    """Compiles what has changed.

    Raises:
        RuntimeError: something that the build needs is missing, or a file does not compile.
    """
    with cache_lock():
        toolkit = Toolkit.find()
        runtime = _build_runtime(toolkit)
        driver = _build_driver(toolkit)
        return Libraries(runtime, driver, _build_module(toolkit, runtime))


@dataclass(frozen=True)
class Toolkit:
    """The CUDA runtime that torch was installed with: its library and its headers."""

    library: Path
    include: Path

    @classmethod
    def find(cls) -> "Toolkit":
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


def _build_runtime(toolkit: Toolkit) -> Path:
    sources = sorted((HERE / "runtime").glob("*.cpp"))
    objects = compile_all([[*CPP, f"-I{toolkit.include}", "-c", str(path)] for path in sources])
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
    return link([*objects, compile_text([*C, "-c"], stubs)], toolkit.library.name, flags)


def _build_driver(toolkit: Toolkit) -> Path:
    header = (toolkit.include / "cuda.h").read_text()
    declared = set(re.findall(r"\b(cu[A-Z]\w+) *\(", header))
    declared |= set(re.findall(r"#define +cu[A-Z]\w+ +(?:\w+\()?(cu[A-Z]\w+)", header))
    declared |= {"cuGetProcAddress_v2", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"}
    [driver] = compile_all([[*C, "-c", str(HERE / "runtime/driver.c")]])
    missing = sorted(declared - _symbols(["nm", "--defined-only", str(driver)]))
    stubs = "".join(f"int {name}(void) {{ return 801; }}\n" for name in missing)
    return link(
        [driver, compile_text([*C, "-c"], stubs)], "libcuda.so.1", ["-Wl,-soname,libcuda.so.1"]
    )


def _build_module(toolkit: Toolkit, runtime: Path) -> Path:
    flags = [f"-DTORCH_EXTENSION_NAME={MODULE}", f"-isystem{sysconfig.get_path('include')}"]
    flags += torch_includes(toolkit)
    sources = sorted((HERE / "aten").glob("*.cpp"))
    objects = compile_all([[*CPP, *flags, "-c", str(path)] for path in sources])
    libraries = [*torch_libraries(), "-ltorch_python", str(runtime)]
    return link(objects, MODULE + str(sysconfig.get_config_var("EXT_SUFFIX")), libraries).parent


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("the CUDA device for tests needs torch: it is not installed")
    folder = Path(spec.origin).parent
    if not (folder / "lib/libtorch_cuda.so").exists():
        raise RuntimeError("the CUDA device for tests needs a CUDA build of torch; this is another")
    return folder


def torch_includes(toolkit: Toolkit) -> list[str]:
    include = _torch() / "include"
    folders = [include, include / "torch/csrc/api/include", toolkit.include]
    return ["-D_GLIBCXX_USE_CXX11_ABI=1", *(f"-isystem{folder}" for folder in folders)]


def torch_libraries() -> list[str]:
    names = ("c10", "torch", "torch_cpu", "torch_cuda", "c10_cuda")
    return [f"-L{_torch() / 'lib'}", *(f"-l{name}" for name in names)]


def _symbols(command: list[str]) -> set[str]:
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return set(re.findall(r" T (\w+)", listing))
