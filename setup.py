"""Builds the extension with cmake and ninja; CMakeLists.txt lists its sources."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libdflare_ops.so"


class CMakeBuild(build_ext):
    """Puts libdflare_ops.so beside dflare._C: in python/dflare in place, or in a wheel."""

    def build_extension(self, ext: Extension) -> None:
        # Imported here: metadata commands must work where these are not installed yet.
        import pybind11
        import torch
        from torch.utils import cpp_extension

        # The interpreter's own cmake and ninja first: its environment need not be activated.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        cmake, ninja = (self._program(name, path) for name in ("cmake", "ninja"))
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        # A build folder per Python and torch: caches of one must not leak into the other.
        build = ROOT / "build" / f"cmake{suffix.removesuffix('.so')}-torch-{torch.__version__}"
        defines = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "DFLARE_VERSION": self.distribution.get_version(),
            "DFLARE_OUTPUT_DIR": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "DFLARE_EXT_SUFFIX": suffix,
            "DFLARE_CUDA": os.environ.get("DFLARE_CUDA", "1"),
            "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "PYBIND11_INCLUDE_DIR": pybind11.get_include(),
            "TORCH_VERSION": torch.__version__,
            "TORCH_CUDA_MAJOR": (torch.version.cuda or "0").split(".")[0],
            "TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
            "TORCH_LIBRARY_DIR": cpp_extension.library_paths()[0],
            "TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
        }
        flags = [f"-D{name}={value}" for name, value in defines.items()]
        subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *flags], check=True)
        subprocess.run([cmake, "--build", build], check=True)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.copy_file(str(Path(self.build_lib, "dflare", LIBRARY)), str(ROOT / "python/dflare"))

    @staticmethod
    def _program(name: str, path: str) -> str:
        found = shutil.which(name, path=path)
        if found is None:
            raise SystemExit(f"{name} was not found: pip install 'cmake>=3.25' 'ninja>=1.11'")
        return found


setup(ext_modules=[Extension("dflare._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
