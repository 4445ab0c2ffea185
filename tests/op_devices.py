"""Where an operator's tests run: the CPU, CUDA's launchers and kernels on the emulator, a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import emulated
import pytest
import torch
from emulated import Emulator, Plant, Shape, emulator
from op_cases import AppendCase, AttentionCase, Inputs
from torch import Tensor

from dflare import ops

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"cpu": (F32, BF16), "emulated": (BF16, F16), "cuda": (BF16, F16)}
# Of a head of a token: the result is rounded once, and before it the fused state or the
# probabilities.
APPEND_TOLERANCE = {F32: 1e-5, BF16: 1e-2, F16: 2e-3}
ATTENTION_TOLERANCE = {F32: 1e-5, BF16: 2e-2, F16: 5e-3}
# append_context_kv with a GEMM however few rows there are.
GEMM = Plant(
    "cuda/launch_append_context_kv.cpp",
    "if (way != Projection::kGemm) {",
    "if (false) {",
)

CPU = pytest.param("cpu", id="cpu")
EMULATED = pytest.param(
    "emulated",
    id="emulated",
    marks=pytest.mark.skipif(bool(emulated.MISSING), reason=emulated.MISSING),
)
CUDA = pytest.param(
    "cuda",
    id="cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
DEVICES = pytest.mark.parametrize("device", [CPU, EMULATED, CUDA])
KERNELS = pytest.mark.parametrize("device", [EMULATED, CUDA])
# For tests of any shape: head sizes to draw from, by device and dtype.
DTYPES_AND_SIZES = pytest.mark.parametrize(
    ("device", "dtype", "head_dims"),
    [
        ("cpu", F32, (16, 32, 48, 64, 80, 128, 256)),
        ("cpu", BF16, (16, 32, 48, 64, 80, 128, 256)),
        *(
            pytest.param("emulated", dtype, (head_dim,), marks=[*EMULATED.marks, pytest.mark.slow])
            for dtype in (BF16, F16)
            for head_dim in (64, 128, 256)
        ),
    ],
    ids=str,
)


class Place:
    """A device for one call: `put` brings tensors there, `wait` returns when they are written."""

    def __init__(self, device: str, emu: Emulator | None = None) -> None:
        self._device, self._emu = device, emu

    def put(self, name: str, x: Tensor, *, late: bool = False) -> Tensor:
        """Of a tensor that the kernel before an operator's writes, `late` is true."""
        if self._emu:
            return self._emu.put(name, x, late=late)
        there = x.to(self._device)
        return there.clone() if late else there

    def wait(self) -> None:
        if self._emu:
            self._emu.wait()
        elif self._device == "cuda":
            torch.cuda.synchronize()


@contextmanager
def place(
    device: str,
    shape: Shape = (torch.bfloat16, 128),
    seed: int = 0,
    *,
    plants: tuple[Plant, ...] = (),
    sm_count: int = 4,
) -> Iterator[Place]:
    """A device; all but its name is the emulator's, element type and head size first."""
    if device != "emulated":
        yield Place(device)
        return
    emu = emulator(*shape, plants)
    with emu.queue(seed, sm_count):
        yield Place(device, emu)


def append(device: str, case: AppendCase, seed: int = 0, **options) -> tuple[Tensor, Tensor]:
    """The pools after append_context_kv."""
    with place(device, (case.dtype, case.head_dim), seed, **options) as at:
        x = {
            name: at.put(name, tensor, late=name == "target_hidden")
            for name, tensor in case.inputs().items()
        }
        case.call(ops.append_context_kv, x)
        at.wait()
        return x["k_pools"].cpu().clone(), x["v_pools"].cpu().clone()


def append_error(device: str, case: AppendCase, seed: int = 0, **options) -> float:
    return case.error(*append(device, case, seed, **options))


def attend(
    device: str,
    case: AttentionCase,
    seed: int = 0,
    *,
    scheduled_lens: tuple[int, ...] | None = None,
    x: Inputs | None = None,
    **options,
) -> Tensor:
    """[layers, rows, heads * head_dim], with one schedule made for `scheduled_lens` if given.

    As in a drafter, the kernel before each layer's attention writes its qkv.
    """
    given = case.inputs() if x is None else x
    with place(device, (case.dtype, case.head_dim), seed, **options) as at:
        x = {name: at.put(name, tensor) for name, tensor in given.items() if name != "qkv"}
        schedule = {}
        if device != "cpu":
            lens = given["seq_lens"]
            if scheduled_lens is not None:
                lens = torch.tensor(scheduled_lens).to(lens)
            schedule = {"schedule": case.schedule(x, at.put("lens", lens))}
        layers = [
            case.call(ops.block_attention, x | {"qkv": at.put("qkv", qkv, late=True)}, **schedule)
            for qkv in given["qkv"]
        ]
        at.wait()
        return torch.stack(layers).cpu()


def attention_error(device: str, case: AttentionCase, seed: int = 0, **options) -> float:
    return case.error(attend(device, case, seed, **options), tensor_cores=device != "cpu")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let CPU operators have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
