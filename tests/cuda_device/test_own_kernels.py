"""The project's own launches: their code runs, what they ask for is checked, and kernels compute.

What a kernel computes in every interleaving is the subject of tests/emulation.
"""

import ctypes
from pathlib import Path

import pytest
import torch
from op_cases import AppendCase, AttentionCase
from torch import Tensor

import cuda_device
from cuda_device.children import in_child
from cuda_device.own_kernels import build_probe, load_kernels
from dflare import ops

ROOT = Path(__file__).parents[2]

ATTENTION = AttentionCase((70, 3), block=4, heads=4, head_dim=64, rotary=64)
APPEND = AppendCase(commit_lens=(3, 1), block=4, head_dim=64, rotary=64)
TOLERANCE = 2e-2
LAUNCH = (ROOT / "csrc/cuda/launch.cuh").read_text()


# ---------------------------------------------------------------- what a launch asks for


def probe(launch: str = LAUNCH, **asked: int) -> int:
    """Launches a kernel by csrc/cuda/launch.cuh; the CUDA error that comes back."""
    library = ctypes.CDLL(str(build_probe(launch)))
    out = torch.zeros(4, dtype=torch.int32, device="cuda")
    given = {"blocks": 4, "threads": 64, "shared_bytes": 0, "overlap": 0, "waits": 0, "cluster": 1}
    error = library.probe(ctypes.c_void_p(out.data_ptr()), *(given | asked).values())
    if error == 0:
        assert out.tolist() == [1, 1, 1, 1]
    ctypes.CDLL(None).cudaGetLastError()  # or the next call of PyTorch reports it
    return error


def planted(before: str, after: str) -> str:
    assert LAUNCH.count(before) == 1, f"launch.cuh does not hold {before!r} once: adapt the plant"
    return LAUNCH.replace(before, after)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"shared_bytes": 48 << 10},
        {"shared_bytes": 200 << 10},
        {"overlap": 1, "waits": 1},
        {"cluster": 2},
    ],
    ids=str,
)
def test_a_launch_that_a_gpu_would_take(asked: dict[str, int]) -> None:
    assert probe(**asked) == 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"blocks": 0}, "an empty grid or block"),
        ({"threads": 1056}, "more than 1024 threads a block"),
        ({"cluster": 3}, "a grid that is no whole number of them"),
        ({"shared_bytes": 228 << 10}, "233472 bytes of dynamic shared memory asked for"),
    ],
    ids=str,
)
def test_a_launch_that_a_gpu_would_refuse(
    asked: dict[str, int], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert probe(**asked) != 0
    assert says in capfd.readouterr().err


def test_shared_memory_without_its_opt_in_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    launch = planted("if (shared_bytes > kWithoutOptIn) {", "if (false) {")
    assert probe(launch, shared_bytes=48 << 10) == 0
    assert probe(launch, shared_bytes=100 << 10) != 0
    assert "102400 bytes of dynamic shared memory, allowed are 49152" in capfd.readouterr().err


def test_a_wait_without_the_programmatic_attribute_is_reported() -> None:
    launch = planted("if (overlap_prior) {", "if (false) {")

    def lose() -> None:
        assert probe(launch, overlap=1, waits=1) != 0
        with pytest.raises(RuntimeError, match="launched without programmatic overlap"):
            torch.cuda.synchronize()

    in_child(lose)


def test_an_overlapped_kernel_that_does_not_wait_is_reported() -> None:
    def lose() -> None:
        assert probe(overlap=1) != 0
        with pytest.raises(RuntimeError, match="exits without wait_for_prior_kernels"):
            torch.cuda.synchronize()

    in_child(lose)


# ---------------------------------------------------------------- the operators


@pytest.fixture(scope="module")
def kernels() -> None:
    load_kernels()


def on_device(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in x.items()}


def attend(x: dict[str, Tensor]) -> Tensor:
    schedule = ATTENTION.schedule(x)
    return ATTENTION.call(ops.block_attention, x | {"qkv": x["qkv"][0]}, schedule=schedule)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_operators_compute_on_the_current_stream(seed: int | None) -> None:
    attention, append = on_device(ATTENTION.inputs()), on_device(APPEND.inputs())
    torch.cuda.synchronize()
    with (
        cuda_device.lazy(seed) if seed else torch.no_grad(),
        torch.cuda.stream(torch.cuda.Stream()),
    ):
        out = attend(attention)[None].cpu()
        APPEND.call(ops.append_context_kv, append)
        pools = append["k_pools"].cpu(), append["v_pools"].cpu()
    assert ATTENTION.error(out) < TOLERANCE
    assert APPEND.error(*pools) < TOLERANCE


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("seed", [None, 1])
def test_a_graph_launches_them_again(seed: int | None) -> None:
    """With other values: what is captured are addresses, and the schedule is made inside."""
    x = on_device(ATTENTION.inputs())
    qkv = x["qkv"].clone()
    x["qkv"].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(x)
    with cuda_device.lazy(seed) if seed else torch.no_grad():
        x["qkv"].copy_(qkv)
        graph.replay()
        assert ATTENTION.error(out[None].cpu()) < TOLERANCE


@pytest.mark.usefixtures("kernels")
def test_their_accesses_are_known() -> None:
    x = on_device(APPEND.inputs())
    side = torch.cuda.Stream()
    torch.cuda.synchronize()

    def append_and_read(wait: bool) -> None:
        APPEND.call(ops.append_context_kv, x)
        if wait:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x["v_pools"].sum()
        torch.cuda.synchronize()

    with cuda_device.no_races():
        append_and_read(wait=True)
    with (
        pytest.raises(AssertionError, match=r"write by .* and read by aten::sum"),
        cuda_device.no_races(),
    ):
        append_and_read(wait=False)
