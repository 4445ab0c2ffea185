"""Finds torch and an nvcc that fits it, before anything is built."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

MODES = ("auto", "require", "1", "0")
MACHINES_TOOLKIT = "/usr/local/cuda"


class BuildError(SystemExit):
    """Ends the build; pip prints the message of a build that fails."""

    def __init__(self, message: str) -> None:
        super().__init__(f"dflare: {message}")


@dataclass(frozen=True)
class Torch:
    """An installed torch, which need not be importable here.

    Attributes:
        folder: with `include` and `lib`.
        version: such as 2.14.1+cu130.
        cuda_major: of the toolkit that it was built with; none without CUDA.
    """

    folder: Path
    version: str
    cuda_major: int | None


@dataclass(frozen=True)
class Toolkit:
    """An nvcc that compiles and links for this torch.

    Attributes:
        nvcc: its path.
        version: such as 13.0.
        own: whether it is a toolkit of the machine; else it came with Python packages.
    """

    nvcc: Path
    version: str
    own: bool


def site_folders() -> list[Path]:
    """Where packages lie: first those that this package is installed beside.

    In pip's isolated build that folder is not on `sys.path`, though the interpreter is its own.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]


def find_torch() -> Torch | None:
    """The torch that the package is built for; read, not imported."""
    for folder in site_folders():
        file = folder / "torch" / "version.py"
        if file.is_file():
            values: dict[str, str | None] = {}
            exec(file.read_text(encoding="utf-8"), values)
            major = re.match(r"\d+", values.get("cuda") or "")
            version = str(values["__version__"])
            return Torch(file.resolve().parent, version, int(major[0]) if major else None)
    return None


def find_toolkit(torch: Torch) -> tuple[Toolkit | None, str]:
    """Look for an nvcc for the CUDA kernels, as `DFLARE_CUDA` says.

    `auto`, the default: where a toolkit is installed on the machine, or one of Python packages
    beside a GPU. `1`: wherever one is found. `require`: a build without the kernels is an error.
    `0`: CPU only.

    Returns:
        The toolkit, and why there is none.

    Raises:
        BuildError: the kernels are required, or there is a GPU, which is of no use without them.
    """
    mode = os.environ.get("DFLARE_CUDA", "auto")
    if mode not in MODES:
        raise BuildError(f"DFLARE_CUDA is {mode!r}, expected one of {', '.join(MODES)}")
    if mode == "0":
        return None, "DFLARE_CUDA=0"
    gpu = has_gpu()
    toolkit, missing = _fitting(torch)
    if toolkit and not toolkit.own and mode == "auto" and not gpu:
        toolkit, missing = None, "no GPU here and no CUDA toolkit but that of Python packages"
    if toolkit is None and (mode == "require" or (mode == "auto" and gpu and torch.cuda_major)):
        reason = "DFLARE_CUDA=require" if mode == "require" else "this machine has an NVIDIA GPU"
        major = torch.cuda_major or 13
        raise BuildError(
            f"{reason}, but the CUDA kernels cannot be built: {missing}. Expected a torch with "
            f"CUDA, and nvcc {major}.x on the PATH, in $CUDA_HOME or from "
            f"pip install 'cuda-toolkit[nvcc,cccl]=={major}.*'; DFLARE_CUDA=0 installs the CPU "
            "operators alone"
        )
    return toolkit, missing


def has_gpu() -> bool:
    """Whether a driver has an NVIDIA GPU here."""
    return Path("/dev/nvidiactl").exists()


def _fitting(torch: Torch) -> tuple[Toolkit | None, str]:
    if torch.cuda_major is None:
        return None, f"torch {torch.version} has no CUDA"
    refused = []
    for nvcc, own in _nvccs(torch.cuda_major):
        version = _version(nvcc)
        if version.split(".")[0] != str(torch.cuda_major):
            refused.append(f"{nvcc} is {version or 'unusable'}")
        elif not _links(nvcc):
            refused.append(f"{nvcc} cannot compile and link")
        else:
            return Toolkit(nvcc, version, own), ""
    found = "; ".join(refused) or "nvcc was not found"
    return None, f"{found}, torch {torch.version} wants CUDA {torch.cuda_major}.x"


def _nvccs(major: int) -> list[tuple[Path, bool]]:
    """Every nvcc, the user's own first, and whether it belongs to the machine."""
    own = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), MACHINES_TOOLKIT):
        own.append(f"{folder}/bin/nvcc" if folder else None)
    carried = [folder / f"nvidia/cu{major}/bin/nvcc" for folder in site_folders()]
    found = [(Path(path), True) for path in own if path]
    found += [(path, False) for path in carried]
    return [(path, machine) for path, machine in dict(found).items() if path.is_file()]


def _version(nvcc: Path) -> str:
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    match = re.search(r"release (\d+\.\d+)", run.stdout)
    return match[1] if match else ""


def _links(nvcc: Path) -> bool:
    """Whether it makes a library: a toolkit can lack headers, libraries or a host compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cu")
        source.write_text(
            "#include <cuda_bf16.h>\n"
            "__global__ void kernel() {}\n"
            "void launch() { kernel<<<1, 1>>>(); }\n"
        )
        command = [nvcc, "-shared", "-Xcompiler=-fPIC", source, "-o", Path(folder, "trial.so")]
        return subprocess.run(command, capture_output=True).returncode == 0
