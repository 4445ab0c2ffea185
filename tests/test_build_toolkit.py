"""Which nvcc builds the CUDA kernels, and what an installation without one says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import build_toolkit  # noqa: E402
from build_toolkit import BuildError, Torch, find_toolkit, find_torch  # noqa: E402

CU13 = Torch(Path("torch"), "2.14.1+cu130", 13)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that plays a machine: nvccs by place and version, with or without a GPU."""

    def play(gpu: bool = False, mode: str | None = None, **nvccs: str) -> None:
        places = {"path": "bin/nvcc", "home": "home/bin/nvcc", "carried": "nvidia/cu13/bin/nvcc"}
        for place, version in nvccs.items():
            nvcc = tmp_path / places[place]
            nvcc.parent.mkdir(parents=True)
            release = f"echo 'Cuda compilation tools, release {version}, V{version}.1'"
            nvcc.write_text(f'#!/bin/sh\n[ "$1" != --version ] || {release}\n')
            nvcc.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        for name in ("CUDACXX", "CUDA_PATH", "DFLARE_CUDA"):
            monkeypatch.delenv(name, raising=False)
        if mode:
            monkeypatch.setenv("DFLARE_CUDA", mode)
        monkeypatch.setattr(build_toolkit, "MACHINES_TOOLKIT", str(tmp_path / "none"))
        monkeypatch.setattr(build_toolkit, "site_folders", lambda: [tmp_path])
        monkeypatch.setattr(build_toolkit, "has_gpu", lambda: gpu)

    return play


def test_the_nvcc_of_torchs_major_version_is_taken_wherever_it_is(machine):
    machine(path="12.4", home="13.1", carried="13.5")
    toolkit, missing = find_toolkit(CU13)
    assert toolkit and (toolkit.version, toolkit.own, missing) == ("13.1", True, "")


def test_the_toolkit_that_python_packages_bring_serves_a_machine_with_a_gpu(machine):
    machine(gpu=True, carried="13.5")
    toolkit, _ = find_toolkit(CU13)
    assert toolkit and (toolkit.version, toolkit.own) == ("13.5", False)


def test_without_a_gpu_that_toolkit_is_not_used_unasked(machine, monkeypatch):
    machine(carried="13.5")
    toolkit, missing = find_toolkit(CU13)
    assert toolkit is None and "no GPU here" in missing
    monkeypatch.setenv("DFLARE_CUDA", "1")
    assert find_toolkit(CU13)[0] is not None


@pytest.mark.parametrize(
    ("play", "torch", "message"),
    [
        ({"mode": "require"}, CU13, "DFLARE_CUDA=require.*nvcc was not found.*nvcc 13.x on the"),
        ({"mode": "require", "path": "12.4"}, CU13, "nvcc is 12.4, torch 2.14.1.* wants CUDA 13.x"),
        ({"gpu": True}, CU13, "this machine has an NVIDIA GPU.*; DFLARE_CUDA=0 installs"),
        ({"mode": "require"}, Torch(Path("t"), "2.14.1+cpu", None), "torch 2.14.1.cpu has no CUDA"),
        ({"mode": "yes"}, CU13, "DFLARE_CUDA is 'yes', expected one of auto, require, 1, 0"),
    ],
)
def test_an_installation_without_the_kernels_that_it_needs_fails_and_says_why(
    machine, play, torch, message
):
    machine(**play)
    with pytest.raises(BuildError, match=message):
        find_toolkit(torch)


def test_without_a_gpu_the_cpu_operators_alone_are_installed(machine):
    machine(path="12.4")
    toolkit, missing = find_toolkit(CU13)
    assert toolkit is None and "nvcc is 12.4" in missing


def test_a_toolkit_that_cannot_link_is_none(machine, tmp_path):
    machine(mode="require", path="13.0")
    (tmp_path / "bin/nvcc").write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'release 13.0, V13.0.1'\n"
    )
    with pytest.raises(BuildError, match="nvcc cannot compile and link"):
        find_toolkit(CU13)


def test_torch_is_found_without_importing_it():
    import torch

    found = find_torch()
    assert found and found.version == torch.__version__
    assert (found.folder / "include/torch/csrc/stable/library.h").is_file()


def test_the_version_that_pip_prints_names_what_was_built():
    command = [sys.executable, "setup.py", "--version"]
    environment = {"DFLARE_CUDA": "0", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip().endswith("+cpu"), run.stderr
    assert "no CUDA kernels (DFLARE_CUDA=0)" in run.stderr


def test_the_library_takes_nothing_from_torch_or_python_but_the_stable_c_interface():
    """So one build serves every Python, and every torch from the oldest on."""
    library = ROOT / "python/dflare/libdflare_ops.so"
    run = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", library], capture_output=True, text=True, check=True
    )
    symbols = [line.split(maxsplit=1)[1] for line in run.stdout.splitlines()]
    theirs = [s for s in symbols if re.search(r"\b(c10|at|torch|caffe2|Py)(::|_|[A-Z])", s)]
    stable = [s for s in theirs if re.fullmatch(r"(aoti_)?torch_\w+", s)]
    assert stable and theirs == stable, sorted(set(theirs) - set(stable))
