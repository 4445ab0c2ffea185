"""Builds libdflare_ops.so with cmake and ninja; CMakeLists.txt lists its sources.

The library uses torch's stable ABI and no symbol of Python's: one wheel serves every Python and
every torch that pyproject.toml allows. The version's last part, which pip prints, names what was
built: `+cu13` with CUDA kernels, `+cpu` without.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # the backend of pyproject.toml leaves it out

from build_toolkit import BuildError, find_toolkit, find_torch  # noqa: E402

LIBRARY = "libdflare_ops.so"


class CMakeBuild(build_ext):
    """Puts the library into the package: in python/dflare in place, or in a wheel."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path("dflare", LIBRARY)) if "." in fullname else LIBRARY

    def build_extension(self, ext: Extension) -> None:
        if TORCH is None:
            raise BuildError("torch was not found: pip install 'torch>=2.11,<2.15'")
        # The interpreter's own cmake and ninja first: its environment need not be activated.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        cmake, ninja = (_program(name, path) for name in ("cmake", "ninja"))
        # A build folder for each torch and toolkit: caches of one must not leak into the other.
        label = TOOLKIT.version if TOOLKIT else "cpu"
        build = ROOT / "build" / f"cmake-torch-{TORCH.version}-{label}"
        defines = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "DFLARE_VERSION": self.distribution.get_version(),
            "DFLARE_OUTPUT_DIR": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "DFLARE_CUDA_MISSING": MISSING,
            "TORCH_VERSION": TORCH.version,
            "TORCH_DIR": TORCH.folder,
        }
        if TOOLKIT:
            defines |= {"DFLARE_NVCC": TOOLKIT.nvcc, "DFLARE_NVCC_VERSION": TOOLKIT.version}
        flags = [f"-D{name}={value}" for name, value in defines.items()]
        subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *flags], check=True)
        subprocess.run([cmake, "--build", build], check=True)


class AnyPythonWheel(bdist_wheel):
    """A wheel for every Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _program(name: str, path: str) -> str:
    found = shutil.which(name, path=path)
    if found is None:
        raise BuildError(f"{name} was not found: pip install 'cmake>=3.25' 'ninja>=1.11'")
    return found


def _version() -> str:
    text = (ROOT / "python/dflare/__init__.py").read_text(encoding="utf-8")
    match = re.search(r'__version__ = "(.+)"', text)
    assert match, "python/dflare/__init__.py has no __version__"
    label = f"cu{TOOLKIT.version.split('.')[0]}" if TOOLKIT else "cpu"
    return f"{match[1]}+{label}"


TORCH = find_torch()
TOOLKIT, MISSING = find_toolkit(TORCH) if TORCH else (None, "torch was not found")
if MISSING:
    print(f"dflare: no CUDA kernels ({MISSING}): CPU operators only", file=sys.stderr)

setup(
    version=_version(),
    ext_modules=[Extension("dflare.libdflare_ops", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
