"""The library as a whole: registration, build, instruction sets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import append_case, block_case, paged_case

from dflare import _C
from dflare.ops.library import OperatorLibraryError, load_library

OPS = torch.ops.dflare
ACCURACY_TESTS = [
    f"{Path(__file__).with_name(name)}::{test}"
    for name, test in (
        ("test_linear.py", "test_equals_the_product_in_float64"),
        ("test_linear.py", "test_a_row_has_the_same_bits_alone_and_beside_others"),
        ("test_append_context_kv.py", "test_equals_the_reference_at_the_demo_drafters_shapes"),
        ("test_append_context_kv.py", "test_equals_the_reference_for_odd_hidden_sizes"),
        ("test_block_attention.py", "test_equals_the_reference_at_the_demo_drafters_shapes"),
        ("test_block_attention.py", "test_equals_the_reference_for_every_head_and_group"),
        ("test_paged_attention.py", "test_equals_the_reference_at_the_demo_targets_shapes"),
        ("test_paged_attention.py", "test_capped_logits_equal_the_reference"),
    )
]


PRINT_ISA = "import sys, pytest, torch, dflare.ops; print(torch.ops.dflare.cpu_isa())"


def run_with_isa(isa: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DFLARE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def runnable_isas() -> list[str]:
    """As the error for an unknown instruction set lists them."""
    refused = run_with_isa("mmx", PRINT_ISA)
    assert refused.returncode != 0
    listed = re.search(r"DFLARE_CPU_ISA is 'mmx'; this CPU and build can run: (.*)", refused.stderr)
    assert listed, refused.stderr
    return listed[1].split(", ")


def test_the_best_runnable_instruction_set_is_chosen(runnable_isas):
    assert runnable_isas[-1] == "baseline"
    assert set(runnable_isas) <= set(_C.build_info()["cpu_isas"])
    if "DFLARE_CPU_ISA" not in os.environ:
        assert OPS.cpu_isa() == runnable_isas[0]


@pytest.mark.slow
@pytest.mark.parametrize("isa", _C.build_info()["cpu_isas"])
def test_every_instruction_set_is_accurate(isa, runnable_isas):
    if isa not in runnable_isas:
        pytest.skip(f"this CPU cannot run {isa}")
    code = PRINT_ISA + "; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    run = run_with_isa(isa, code, *ACCURACY_TESTS)
    assert run.returncode == 0, run.stdout
    assert run.stdout.splitlines()[0] == isa
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout


@pytest.mark.parametrize(
    ("operator", "case"),
    [
        ("append_context_kv", append_case(0, bias=True)),
        ("append_context_kv", append_case(0, commit_lens=[4, 4], block_size=4)),
        ("block_attention", block_case(0, seq_lens=[5, 9])),
        ("paged_attention", paged_case(0, queries=[2, 3], contexts=[4, 0])),
        ("linear", {"x": torch.ones(3, 8), "weight": torch.ones(5, 8), "bias": torch.ones(5)}),
    ],
)
def test_operators_are_registered_as_torch_expects(operator, case):
    packed = {
        name: [x.contiguous() for x in value] if name.endswith("_pools") else value
        for name, value in case.items()
    }
    result = torch.library.opcheck(getattr(OPS, operator).default, (), packed)
    assert set(result.values()) == {"SUCCESS"}


def test_fake_results_have_the_real_ones_shapes():
    for operator, case in (
        (OPS.block_attention, block_case(1, seq_lens=[5, 9], group=2)),
        (OPS.paged_attention, paged_case(1, queries=[2], contexts=[3], padding=2)),
        (OPS.linear, {"x": torch.ones(3, 8), "weight": torch.ones(5, 8), "bias": None}),
    ):
        meta = {
            name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in case.items()
        }
        real, fake = operator(**case), operator(**meta)
        assert fake.is_meta and fake.shape == real.shape and fake.dtype == real.dtype


def test_build_information_describes_this_build():
    info = _C.build_info()
    assert info["torch"] == torch.__version__
    assert info["version"] and info["compiler"]
    assert info["cpu_isas"][0] == "baseline"
    assert all(re.fullmatch(r"sm_\d+a?", arch) for arch in info["cuda_archs"])


def test_a_missing_library_says_how_to_build_it(tmp_path):
    with pytest.raises(OperatorLibraryError, match=r"does not exist; build it with: pip install"):
        load_library(tmp_path / "libdflare_ops.so")


def test_a_library_that_does_not_load_says_what_to_do(tmp_path):
    broken = tmp_path / "libdflare_ops.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(OperatorLibraryError, match="rebuild it with: pip install"):
        load_library(broken)


def test_importing_the_operators_does_not_import_sglang():
    code = "import sys, dflare.ops; sys.exit('sglang' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
