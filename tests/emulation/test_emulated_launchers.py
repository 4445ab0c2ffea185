"""The Torch launchers on the emulator: from the op's arguments to the pools, without a GPU."""

import mmap
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from emulated import build_launchers
from kernel_cases import AppendCase, AttentionCase
from torch import Tensor

pytestmark = pytest.mark.slow
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
MAP_NORESERVE = 0x4000  # of Linux; mmap has the name from Python 3.13 on


@pytest.fixture(scope="module")
def ops() -> object:
    torch.ops.load_library(str(build_launchers()))
    return torch.ops.dflare_emulated


def append(ops, case: AppendCase, **changed: object) -> dict[str, Tensor]:
    """Calls the op on a case's inputs, some of them changed; returns the inputs."""
    x = case.inputs() | changed
    ops.append_context_kv(*case.arguments(x))
    return x


def attend(ops, case: AttentionCase, **changed: object) -> Tensor:
    x = case.inputs()
    x["qkv"] = x["qkv"][0]
    x |= changed  # type: ignore[arg-type]
    schedule = x["schedule"] if "schedule" in x else case.schedule(ops, x)
    return ops.block_attention(*case.arguments(x, x["qkv"]), schedule)


@pytest.mark.parametrize(
    "case",
    [
        AppendCase(),
        AppendCase(commit_lens=(3, 0, 9), bias=True, kv_heads=2),
        AppendCase(rows=330, hidden=64, layers=1),  # GEMM path
        AppendCase(commit_lens=(1, 2) * 25, hidden=64, layers=1),  # GEMM path with unused rows
        AppendCase(rows=2060, hidden=16, taps=1, layers=1, head_dim=64, rotary=64),  # two panels
        AppendCase(commit_lens=(1, 0, 2) * 46, hidden=16, layers=1, taps=1),  # panels of blocks
        AppendCase(rows=0),
        AppendCase(rows=20, dtype=torch.float16, head_dim=256, rotary=64),
    ],
    ids=str,
)
def test_appends_the_context_of_every_valid_row(ops, case: AppendCase) -> None:
    x = append(ops, case)
    assert case.error(x["k_pools"], x["v_pools"]) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase((300, 0)),
        AttentionCase((70,), window=20, causal=True, lens_64bit=False),
        AttentionCase((70,), head_dim=64, rotary=32, dtype=torch.float16, heads=4, kv_heads=4),
        AttentionCase((70,), head_dim=256, block=32),
    ],
    ids=str,
)
def test_attends_to_context_and_block(ops, case: AttentionCase) -> None:
    assert case.error(attend(ops, case)[None]) < TOLERANCE[case.dtype]


def test_takes_strided_rows_and_pools(ops) -> None:
    case = AttentionCase((100,))
    x = case.inputs()
    strided = {}
    for name, tensor in (("qkv", x["qkv"][0]), ("k_pool", x["k_pool"]), ("v_pool", x["v_pool"])):
        wide = tensor.new_full((tensor.shape[0], 2, *tensor.shape[1:]), torch.nan)
        wide[:, 1] = tensor
        strided[name] = wide[:, 1]
    assert case.error(attend(ops, case, **strided)[None]) < TOLERANCE[case.dtype]


def test_pools_may_reach_beyond_32_bits(ops) -> None:
    """Slots whose first element is beyond the pool's 2^31st: a product of ints would overflow."""
    case = AttentionCase((40,))
    x = case.inputs()
    far = {name: spread(x[name]) for name in ("k_pool", "v_pool")}
    assert case.error(attend(ops, case, **far)[None]) < TOLERANCE[case.dtype]
    for append_case in (
        AppendCase(commit_lens=(3, 9), layers=1),
        AppendCase(rows=330, hidden=64, layers=1),  # GEMM path
    ):
        x = append_case.inputs()
        far = {name: spread(x[name][0])[None] for name in ("k_pools", "v_pools")}
        append(ops, append_case, **far)
        assert append_case.error(far["k_pools"], far["v_pools"]) < TOLERANCE[append_case.dtype]


def test_an_empty_batch_is_an_empty_result(ops) -> None:
    case = AttentionCase((5,))
    x = case.inputs()
    empty = {name: x[name][:0] for name in ("positions", "req_pool_indices", "seq_lens")}
    assert attend(ops, case, qkv=x["qkv"][0][:0], **empty).shape == (0, 8 * 128)


APPEND = AppendCase(commit_lens=(3, 1))
ATTENTION = AttentionCase((64,))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("target_hidden has dtype Float", lambda x: {"target_hidden": x["target_hidden"].float()}),
        ("target_hidden has shape", lambda x: {"target_hidden": x["target_hidden"][:, 8:]}),
        ("target_hidden has .* rows", lambda x: {"commit_lens": x["commit_lens"][1:]}),
        ("fusion_probs has dtype", lambda x: {"fusion_probs": x["fusion_probs"].bfloat16()}),
        ("fusion_probs has 0 layers", lambda x: {"fusion_probs": x["fusion_probs"][:0]}),
        ("k_pools has 1 and v_pools 2", lambda x: {"k_pools": x["k_pools"][:1]}),
        ("head_dim 32", lambda x: {"k_pools": x["k_pools"][..., :32]}),
        ("v_pools has shape", lambda x: {"v_pools": x["v_pools"][..., :64]}),
        ("kv_weight has shape", lambda x: {"kv_weight": x["kv_weight"][:, 1:]}),
        ("kv_weight .* strides", lambda x: {"kv_weight": x["kv_weight"].mT.contiguous().mT}),
        ("norm_weight has 255", lambda x: {"norm_weight": x["norm_weight"][:255]}),
        ("multiple of 16 bytes", lambda x: {"k_norm_weight": shifted(x["k_norm_weight"])}),
        ("cos_sin_cache has 126", lambda x: {"cos_sin_cache": x["cos_sin_cache"][:, :126].clone()}),
        ("positions has dtype", lambda x: {"positions": x["positions"].int()}),
        ("cache_loc has shape", lambda x: {"cache_loc": x["cache_loc"][1:]}),
        ("kv_bias has shape", lambda x: {"kv_bias": x["k_norm_weight"]}),
    ],
)
def test_append_names_the_argument_that_does_not_fit(
    ops, message: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    with pytest.raises(RuntimeError, match=f"append_context_kv: .*{message}"):
        append(ops, APPEND, **change(APPEND.inputs()))


@pytest.mark.parametrize(
    ("message", "case", "change"),
    [
        ("qkv has dtype Float", ATTENTION, lambda x: {"qkv": x["qkv"][0].float()}),
        ("qkv has .* columns", ATTENTION, lambda x: {"qkv": x["qkv"][0][:, :200].clone()}),
        ("qkv has shape", ATTENTION, lambda x: {"qkv": x["qkv"][0][1:]}),
        ("row stride of 1540", ATTENTION, lambda x: {"qkv": odd_rows(x["qkv"][0])}),
        ("v_pool has shape", ATTENTION, lambda x: {"v_pool": x["v_pool"][:, :1]}),
        ("req_to_token has dtype", ATTENTION, lambda x: {"req_to_token": x["req_to_token"].long()}),
        ("req_to_token has strides", ATTENTION, lambda x: {"req_to_token": x["req_to_token"].T}),
        (
            "seq_lens has dtype",
            ATTENTION,
            lambda x: {"seq_lens": x["seq_lens"].float(), "schedule": None},
        ),
        ("schedule has shape", ATTENTION, lambda x: {"schedule": torch.zeros(3).int()}),
        ("schedule is None", ATTENTION, lambda x: {"schedule": None}),
        ("block_size is 33", replace(ATTENTION, block=33), lambda x: {"schedule": None}),
        ("7 query heads are no multiple", ATTENTION, lambda x: {"qkv": x["qkv"][0][:, :1408]}),
    ],
)
def test_attention_names_the_argument_that_does_not_fit(
    ops,
    message: str,
    case: AttentionCase,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor | None]],
) -> None:
    with pytest.raises(RuntimeError, match=f"block_attention: .*{message}"):
        attend(ops, case, **change(case.inputs()))


def test_append_refuses_a_block_that_attention_would_not_take(ops) -> None:
    with pytest.raises(RuntimeError, match="append_context_kv: block_size is 33, expected 1 to 32"):
        append(ops, AppendCase(commit_lens=(3,), block=33))


def test_older_architectures_are_refused_by_name(ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLARE_EMULATED_CAPABILITY", "7")
    expected = r"has compute capability 7\.0, the kernels need 8\.0 or later"
    with pytest.raises(RuntimeError, match=f"append_context_kv: cpu {expected}"):
        append(ops, APPEND)
    with pytest.raises(RuntimeError, match=f"block_attention_schedule: cpu {expected}"):
        attend(ops, ATTENTION)


@pytest.mark.parametrize("major", [8, 10, 12, 13])
def test_every_architecture_from_8_on_attends(
    ops, major: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sm_80 has no programmatic dependent launch: kernels then start one after the other.

    There is machine code up to 12.x and PTX for what comes after it.
    """
    monkeypatch.setenv("DFLARE_EMULATED_CAPABILITY", str(major))
    x = append(ops, APPEND)
    assert APPEND.error(x["k_pools"], x["v_pools"]) < TOLERANCE[APPEND.dtype]
    assert ATTENTION.error(attend(ops, ATTENTION)[None]) < TOLERANCE[ATTENTION.dtype]


def shifted(x: Tensor) -> Tensor:
    """The same values, two bytes off alignment."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def odd_rows(x: Tensor) -> Tensor:
    """The same rows, four elements further apart."""
    return torch.nn.functional.pad(x, (0, 4))[:, : x.shape[1]]


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
    return elements.as_strided(pool.shape, (apart, *pool.stride()[1:])).copy_(pool)
