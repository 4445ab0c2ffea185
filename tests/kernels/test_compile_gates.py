"""Every CUDA kernel compiles for every architecture within its budget; needs nvcc, not a GPU."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
CHECK = CSRC / "gates" / "check.py"


@pytest.fixture(scope="module")
def gates() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_gates", CHECK)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(CHECK.parent))  # as for a script
    spec.loader.exec_module(module)
    return module


REPORT = """\
ptxas info    : Compiling entry function \
'_ZN6dflare22block_attention_kernelINS_4Bf16ELi128ELi4EEEvNS_20BlockAttentionParamsE' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 214 registers, used 1 barriers
"""


def test_reads_the_compiler_report(gates: ModuleType) -> None:
    (kernel,) = gates.parse_report(REPORT, "sm_90")
    assert kernel.name == "block_attention_kernel<Bf16,128,4>"
    assert (kernel.registers, kernel.spilled_bytes) == (214, 8 + 4 + 12)


def test_names_every_way_to_fail(gates: ModuleType) -> None:
    (kernel,) = gates.parse_report(REPORT, "sm_90")
    kernel.instructions = Counter({"HMMA.16816.F32.BF16": 4, "LDSM.16.M88.4": 1, "STL.64": 1})
    kernel.check({(kernel.name, "sm_90"): 208})
    text = " | ".join(kernel.faults)
    for expected in ("214 registers, budget 208", "24 bytes spilled", "no LDGSTS", "STL in the"):
        assert expected in text


def test_spill_loads_alone_are_spills(gates: ModuleType) -> None:
    report = REPORT.replace("8 bytes stack", "0 bytes stack").replace(
        "4 bytes spill", "0 bytes spill"
    )
    (kernel,) = gates.parse_report(report, "sm_90")
    assert kernel.spilled_bytes == 12


def test_all_inline_ptx_is_in_headers_of_its_own() -> None:
    sources = sorted((CSRC / "cuda").rglob("*.*"))
    found = [path.name for path in sources if re.search(r"\basm\b", path.read_text())]
    assert found == ["ptx.cuh", "ptx_sm90.cuh"]


def test_what_sm_90a_alone_has_is_compiled_for_it_alone(gates: ModuleType) -> None:
    for path in (CSRC / "cuda").rglob("*.cu"):
        own_units = "wgmma" in path.read_text()
        assert (gates.architectures(path) == ("sm_90a",)) == own_units, path.name


def test_kernels_know_no_torch() -> None:
    kernels = [*(CSRC / "cuda").rglob("*.cu*"), CSRC / "cuda/params.h", CSRC / "cuda/heuristics.h"]
    assert len(kernels) > 15
    for path in kernels:
        assert not re.search(r"#include [<\"](torch|ATen|c10)/", path.read_text()), path.name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize(
    ("only", "count"),
    [
        (["--only", "block_attention_bf16_128"], r"[1-9]\d?"),
        pytest.param([], r"\d{2,}", marks=pytest.mark.long),
    ],
    ids=["attention of published drafters", "all"],
)
def test_kernels_are_within_budget(only: list[str], count: str) -> None:
    result = subprocess.run([sys.executable, str(CHECK), *only], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(rf"^{count} kernels within budget, none spills$", result.stdout, re.M)


def test_without_nvcc_it_says_so_and_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    result = subprocess.run([sys.executable, str(CHECK)], capture_output=True, text=True)
    assert (result.returncode, "no CUDA kernel was compiled" in result.stdout) == (0, True)


def test_with_nvcc_but_no_nvdisasm_it_fails(
    gates: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the gates would be left out: that must not look like a pass."""
    monkeypatch.setattr(sys, "argv", [str(CHECK)])
    monkeypatch.setattr(gates.shutil, "which", lambda name: "/bin/nvcc" if name == "nvcc" else None)
    monkeypatch.setattr(gates, "find_tool", lambda _: None)
    assert gates.main() == 1
    assert "found /bin/nvcc, but no nvdisasm" in capsys.readouterr().out
