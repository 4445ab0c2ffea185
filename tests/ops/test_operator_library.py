"""The library as a whole: registration, build, instruction sets."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from op_cases import AppendCase, AttentionCase, PagedCase, lookup_case

from dflare.checkpoint.config import MAX_BLOCK_SIZE
from dflare.errors import UnsupportedError
from dflare.ops import library
from dflare.ops.library import (
    DrafterSizes,
    OperatorLibraryError,
    build_info,
    check_kernels_for,
    check_sizes,
    check_support,
    load_library,
)

OPS = torch.ops.dflare
LIMITS = {"count": 3, "least_match": 3, "longest_match": 64}
LOOKUP = lookup_case(0, [5, 9], vocabulary=2) | LIMITS
HEAD = {
    "hidden": torch.ones(4, 8),
    "weight": torch.ones(5, 8),
    "block_size": 2,
    "ids": None,
    "first_id": 0,
    "tokens": torch.zeros(2).long(),
}
NORM = {"x": torch.ones(3, 8), "residual": torch.ones(3, 8), "weight": torch.ones(8), "eps": 0.1}
ROTARY = {
    "x": torch.ones(3, 8),
    "cos_sin_cache": torch.ones(5, 4),
    "positions": torch.ones(3, dtype=torch.long),
    "head_dim": 4,
}
ACCURACY_TESTS = [
    f"{Path(__file__).with_name(name)}::{test}"
    for name, test in (
        ("test_pointwise.py", "test_add_rms_norm"),
        ("test_pointwise.py", "test_silu_and_mul"),
        ("test_pointwise.py", "test_rotate_heads"),
        ("test_linear.py", "test_equals_the_product_in_float64"),
        ("test_head_argmax.py", "test_equals_the_argmax_of_the_logits[whole-cpu]"),
        ("test_linear.py", "test_a_row_has_the_same_bits_alone_and_beside_others"),
        ("test_append_context_kv.py", "test_a_cpu_takes_any_hidden_size"),
        ("test_block_attention.py", "test_a_cpu_takes_every_head_and_group"),
        ("test_block_attention.py", "test_any_number_of_threads_gives_the_reference_result"),
        ("test_paged_attention.py", "test_is_as_accurate_as_pytorch_at_the_demo_targets_shapes"),
        ("test_paged_attention.py", "test_capped_logits_equal_the_reference"),
        ("test_paged_attention.py", "test_a_token_has_the_bits_of_plain_decoding_in_any_batch"),
        ("test_paged_attention.py", "test_a_node_has_the_bits_of_plain_decoding"),
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
    assert set(runnable_isas) <= set(build_info()["cpu_isas"])
    if "DFLARE_CPU_ISA" not in os.environ:
        assert OPS.cpu_isa() == runnable_isas[0]


@pytest.mark.slow
@pytest.mark.parametrize("isa", build_info()["cpu_isas"])
def test_every_instruction_set_is_accurate(isa, runnable_isas):
    if isa not in runnable_isas:
        pytest.skip(f"this CPU cannot run {isa}")
    code = PRINT_ISA + "; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    run = run_with_isa(isa, code, *ACCURACY_TESTS)
    assert run.returncode == 0, run.stdout
    assert run.stdout.splitlines()[0] == isa
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout


def flat(case: AppendCase | AttentionCase | PagedCase, **changed) -> tuple:
    """The arguments as Torch's operator takes them, contiguous."""
    taken = []

    def take(*arguments):
        for each in arguments:
            taken.extend(each) if isinstance(each, tuple) else taken.append(each)

    x = case.inputs() | changed
    if isinstance(case, AttentionCase):
        x["qkv"] = x["qkv"][0]
    case.call(take, x)

    def packed(x):
        if isinstance(x, list):
            return [packed(each) for each in x]
        return x.contiguous() if isinstance(x, torch.Tensor) else x

    return tuple(packed(each) for each in taken)


F32 = torch.float32
APPEND = AppendCase(dtype=F32, bias=True, rows=5)
ATTENTION = AttentionCase((5, 9), dtype=F32, block=4)
PAGED = PagedCase((2, 3), (4, 0), padding=2)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("append_context_kv", flat(APPEND)),
        ("append_context_kv", flat(replace(APPEND, commit_lens=(4, 4), block=4))),
        ("block_attention", flat(ATTENTION)),
        ("paged_attention", flat(PAGED)),
        ("lookup_continuations", tuple(LOOKUP.values())),
        ("head_argmax", tuple(HEAD.values())),
        ("linear", (torch.ones(3, 8), torch.ones(5, 8), torch.ones(5))),
        ("add_rms_norm", tuple(NORM.values())),
        ("silu_and_mul", (torch.ones(3, 8),)),
        ("rotate_heads", tuple(ROTARY.values())),
    ],
)
def test_operators_are_registered_as_torch_expects(operator, arguments):
    result = torch.library.opcheck(getattr(OPS, operator).default, arguments)
    assert set(result.values()) == {"SUCCESS"}


def test_fake_results_have_the_real_ones_shapes():
    for operator, arguments in (
        (OPS.block_attention, flat(ATTENTION)),
        (OPS.paged_attention, flat(PAGED)),
        (OPS.head_argmax, tuple(HEAD.values())),
        (OPS.linear, (torch.ones(3, 8), torch.ones(5, 8), None)),
        (OPS.add_rms_norm, tuple(NORM.values())),
        (OPS.silu_and_mul, (torch.ones(3, 8),)),
    ):
        meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
        real, fake = operator(*arguments), operator(*meta)
        assert fake.is_meta and fake.shape == real.shape and fake.dtype == real.dtype


def test_build_information_describes_this_build():
    info = build_info()
    assert info["torch"] == torch.__version__
    assert info["version"] and info["compiler"]
    assert info["cpu_isas"][0] == "baseline"
    assert all(re.fullmatch(r"(sm|compute)_\d+", arch) for arch in info["cuda_archs"])
    assert bool(info["cuda_archs"]) != bool(info["cuda_missing"])


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


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_kernels_take_is_supported(dtype):
    check_support(CPU, dtype, 48)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "message"),
    [
        (CPU, torch.float16, 64, "float16; on cpu .* bfloat16 and float32: pass --dtype bfloat16"),
        (CUDA, torch.float32, 64, "float32; on cuda .* and float16: pass --dtype bfloat16"),
        (CUDA, torch.bfloat16, 96, "head_dim 96; the CUDA kernels take 64, 128 and 256"),
        (CPU, torch.bfloat16, 72, "head_dim 72; the CPU kernels take multiples of 16"),
    ],
)
def test_what_no_kernel_takes_is_refused(device, dtype, head_dim, message, monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(UnsupportedError, match=message):
        check_support(device, dtype, head_dim)


@pytest.mark.parametrize(
    ("built", "capability", "message"),
    [
        (False, (9, 0), r"built without CUDA kernels.*cuda:0.*nvcc on the PATH.*=require pip inst"),
        (True, (7, 5), r"T4 has compute capability 7\.5; the CUDA kernels need 8\.0 or later"),
    ],
)
def test_gpus_without_kernels_are_refused(built, capability, message, monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    with pytest.raises(OperatorLibraryError, match=message):
        check_support(CUDA, torch.bfloat16, 128)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_library_of_older_sources_says_what_to_do(device, monkeypatch):
    monkeypatch.setattr(library, "_NEWEST", "an_operator_of_tomorrow")
    with pytest.raises(OperatorLibraryError, match=r"no operator an_operator.*rebuild"):
        check_kernels_for(device)


LARGEST = DrafterSizes(layers=16, taps=32, hidden=8192, rotary=256, block=32, group=32)


def test_the_largest_drafter_is_supported():
    check_sizes(CUDA, LARGEST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 17}, "has 17 layers, expected at most 16"),
        ({"taps": 33}, "has 33 taps, expected at most 32"),
        ({"hidden": 8200}, "has hidden size 8200, expected a multiple of 8 of at most 8192"),
        ({"hidden": 4100}, "has hidden size 4100, expected a multiple of 8"),
        ({"rotary": 40}, "has 40 rotated dimensions a head, expected a multiple of 16"),
        ({"block": 33, "group": 1}, "has block size 33, expected at most 32"),
        ({"group": 33}, "has 33 query heads a KV head in blocks of 32, .* at most 1024"),
        ({"layers": 17, "taps": 33}, "17 layers, .*; it has 33 taps, .* Serve it on a CPU, or"),
    ],
)
def test_a_drafter_beyond_the_kernels_limits_is_refused_on_cuda_alone(change, message):
    sizes = replace(LARGEST, **change)
    with pytest.raises(UnsupportedError, match=message):
        check_sizes(CUDA, sizes)
    check_sizes(CPU, sizes)


def test_the_limits_are_those_of_the_cuda_sources():
    source = (Path(__file__).parents[2] / "csrc/cuda/heuristics.h").read_text()
    constants = dict(re.findall(r"constexpr int kMax(\w+) = (\d+);", source))
    assert {name: int(value) for name, value in constants.items()} == {
        "Layers": library.MAX_LAYERS,
        "Taps": library.MAX_TAPS,
        "Hidden": library.MAX_HIDDEN,
        "Block": library.MAX_BLOCK,
        "QueryRows": library.MAX_QUERY_ROWS,
    }
    assert library.MAX_BLOCK == MAX_BLOCK_SIZE
