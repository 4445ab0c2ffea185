"""CUDA's launchers at the limits of addresses and architectures, without a GPU."""

import mmap

import pytest
import torch
from emulated import emulator
from op_cases import AppendCase, AttentionCase
from op_devices import APPEND_TOLERANCE, ATTENTION_TOLERANCE
from torch import Tensor

from dflare import ops

MAP_NORESERVE = 0x4000  # of Linux; mmap has the name from Python 3.13 on
EMULATOR = (torch.bfloat16, 128)


def append(case: AppendCase, **changed: Tensor) -> float:
    x = case.inputs() | changed
    case.call(ops.append_context_kv, x)
    return case.error(x["k_pools"], x["v_pools"])


def attend(case: AttentionCase, **changed: Tensor) -> float:
    x = case.inputs() | changed
    x["qkv"] = x["qkv"][0]
    return case.error(case.call(ops.block_attention, x, schedule=case.schedule(x))[None])


def spread(pool: Tensor) -> Tensor:
    """The same slots, so far apart that the last one ends about 2^32 elements from the first.

    The memory in between is reserved and never touched: it costs addresses, not pages.
    """
    apart = 2**32 // pool.shape[0] // 8 * 8
    memory = mmap.mmap(
        -1,
        pool.shape[0] * apart * pool.itemsize,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE,
    )
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # else a slot would take 2 MiB
    elements = torch.frombuffer(memory, dtype=pool.dtype)
    return elements.as_strided(pool.shape, (apart, pool.shape[2], 1)).copy_(pool)


def test_pools_may_reach_beyond_32_bits() -> None:
    """Slots whose first element is beyond the pool's 2^31st: a product of ints would overflow."""
    with emulator(*EMULATOR).installed():
        case = AttentionCase((40,))
        far = {name: spread(case.inputs()[name]) for name in ("k_pool", "v_pool")}
        assert attend(case, **far) < ATTENTION_TOLERANCE[case.dtype]
        for commit_lens, rows in (((3, 9), 0), (None, 330)):  # the second one by way of a GEMM
            context = AppendCase(commit_lens, rows, hidden=64, layers=1)
            x = context.inputs()
            far = {name: spread(x[name][0])[None] for name in ("k_pools", "v_pools")}
            assert append(context, **far) < APPEND_TOLERANCE[context.dtype]


@pytest.mark.parametrize("major", [8, 10, 12, 13])
def test_every_architecture_from_8_on_attends(major: int) -> None:
    """sm_80 has no programmatic dependent launch: kernels then start one after the other.

    There is machine code up to 12.x and PTX for what comes after it.
    """
    with emulator(*EMULATOR).installed(capability=major):
        assert append(AppendCase(commit_lens=(3, 1))) < APPEND_TOLERANCE[torch.bfloat16]
        assert attend(AttentionCase((64,))) < ATTENTION_TOLERANCE[torch.bfloat16]
