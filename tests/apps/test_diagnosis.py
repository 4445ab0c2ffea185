"""`dflare doctor` on a machine with a GPU: kernels that are missing or do not fit are a problem."""

import pytest
import torch

from dflare import ops
from dflare.apps import diagnosis


@pytest.fixture
def gpu(monkeypatch):
    """A function that plays a GPU and a build of the library for it."""

    def play(capability: tuple[int, int], archs: list[str], missing: str = "") -> None:
        built = ops.build_info() | {"cuda_archs": archs, "cuda_missing": missing}
        for module in (ops, ops.library):
            monkeypatch.setattr(module, "build_info", lambda: built)
        monkeypatch.setattr(
            torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: bool(archs)
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "B200")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    return play


def test_kernels_for_the_gpu_are_no_problem(gpu):
    gpu((10, 3), ["sm_80", "sm_90", "sm_100"])
    report = diagnosis.diagnose()
    assert report["problems"] == []
    assert report["facts"]["device"] == "B200 (sm_103)"
    assert report["facts"]["CUDA kernels"] == "sm_80 sm_90 sm_100"


def test_a_library_without_cuda_kernels_is_a_problem_and_says_why(gpu):
    missing = "nvcc 12.4, torch 2.9 wants CUDA 13.x"
    gpu((9, 0), [], missing)
    report = diagnosis.diagnose()
    (problem,) = report["problems"]
    assert f"without CUDA kernels ({missing}), but the device is cuda:0" in problem
    built = report["facts"]["CUDA kernels"]
    assert built == f"not built ({missing})"


def test_a_gpu_that_no_kernel_is_made_for_is_a_problem(gpu):
    gpu((7, 5), ["sm_80", "sm_90", "sm_100"])
    (problem,) = diagnosis.diagnose()["problems"]
    assert "has compute capability 7.5; the CUDA kernels need 8.0 or later" in problem


def test_an_architecture_that_the_toolkit_left_out_is_a_problem(gpu):
    gpu((10, 0), ["sm_80", "sm_90"])
    (problem,) = diagnosis.diagnose()["problems"]
    assert "were built for sm_80 sm_90, none of which runs on cuda:0 (B200)" in problem


def test_ptx_serves_newer_gpus_than_there_is_machine_code_for(gpu):
    gpu((13, 0), ["sm_80", "sm_90", "sm_100", "compute_100"])
    assert not diagnosis.diagnose()["problems"]


def test_a_cpu_needs_no_cuda_kernels(monkeypatch):
    built = ops.build_info() | {"cuda_archs": [], "cuda_missing": "nvcc is not on the PATH"}
    monkeypatch.setattr(ops, "build_info", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = diagnosis.diagnose()
    assert report["problems"] == []
    assert report["facts"]["CUDA kernels"] == "not built (nvcc is not on the PATH)"


def test_a_plug_in_that_sglang_is_told_to_leave_out_is_a_problem(monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    report = diagnosis.diagnose()
    assert any("SGLANG_PLUGINS='other' leaves the plug-in out" in p for p in report["problems"])
    monkeypatch.setenv("SGLANG_PLUGINS", "other, dflare")
    assert diagnosis.diagnose()["facts"]["plug-in"] == "--speculative-algorithm DFLARE"


@pytest.mark.slow
def test_loaded_into_sglang_it_is_registered():
    report = diagnosis.diagnose(load=True)
    assert report["problems"] == []
    assert report["facts"]["platform"] == "CpuPlatform"
