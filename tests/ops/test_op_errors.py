"""What does not fit raises on every device: operator, argument, given, expected."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace

import emulated
import pytest
import torch
from emulated import emulator
from op_cases import AppendCase, AttentionCase, Inputs, PagedCase
from torch import Tensor

from dflare import ops

Change = Callable[[Inputs], object]
DEVICES = ("cpu", "cuda")  # the latter by its launchers on the emulator
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def put(name: str, value: Callable) -> Change:
    return lambda x: x.update({name: value(x[name])})


def turned(x: Tensor) -> Tensor:
    """The same values, the last two dimensions stored the other way round."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def shifted(x: Tensor) -> Tensor:
    """The same values, two bytes off alignment."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def rows(table: list[tuple]) -> list:
    """A parameter for each device of a row: change, message and, if it is not both, device."""
    return [
        pytest.param(
            device,
            change,
            message,
            id=f"{device}: {message}",
            marks=pytest.mark.skipif(
                device == "cuda" and bool(emulated.MISSING), reason=emulated.MISSING
            ),
        )
        for change, message, *only in table
        for device in (only or DEVICES)
    ]


@contextlib.contextmanager
def refused(device: str, operator: str, message: str):
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(emulator(torch.bfloat16, 128).installed())
        with pytest.raises(RuntimeError, match=re.escape(message)) as error:
            yield
        assert str(error.value).startswith(f"{operator}: ")


APPEND = AppendCase(commit_lens=(4, 4, 4), block=4, layers=3, bias=True)
APPEND_ERRORS = [
    (
        put("target_hidden", lambda x: x.half()),
        "target_hidden has dtype Half, expected Float or",
        "cpu",
    ),
    (put("target_hidden", lambda x: x.float()), "dtype Float, expected BFloat16 or Half", "cuda"),
    (put("target_hidden", lambda x: x[0]), "target_hidden has shape [768], expected [-1, 768]"),
    (
        put("target_hidden", lambda x: x[:, 8:]),
        "target_hidden has shape [12, 760], expected [-1, 768] = [N, taps * hidden]",
    ),
    (put("target_hidden", turned), "[12, 768] has strides [1, 12], expected 1 for dimension 1"),
    (put("target_hidden", lambda x: x[:, :768].clone()[:, 1:]), "has shape [12, 767]"),
    (put("fusion_probs", lambda x: x.double()), "fusion_probs has dtype Double, expected Float"),
    (put("fusion_probs", lambda x: x[:0]), "fusion_probs has 0 layers, expected at least 1"),
    (put("fusion_probs", lambda x: x[:2]), "expected one for each of the 2 layers of fusion_probs"),
    (
        put("fusion_probs", lambda x: x.repeat(1, 11)),
        "fusion_probs has 33 taps, expected at most 32",
        "cuda",
    ),
    (put("norm_weight", lambda x: x[:8]), "target_hidden has shape [12, 768], expected [-1, 24]"),
    (put("norm_weight", lambda x: x[:255]), "norm_weight has 255 elements, expected a", "cuda"),
    (put("norm_weight", lambda x: x.double()), "norm_weight has dtype Double, expected "),
    (put("kv_weight", lambda x: x[:, 1:]), "kv_weight has shape [3, 255, 256], expected [3, 256,"),
    (put("kv_weight", lambda x: x.double()), "kv_weight has dtype Double, expected "),
    (put("kv_weight", turned), "kv_weight of shape [3, 256, 256] has strides"),
    (put("kv_bias", lambda x: x[:, 1:]), "kv_bias has shape [3, 255], expected [3, 256]"),
    (put("k_norm_weight", lambda x: x[:1]), "k_norm_weight has shape [1, 128], expected [3, 128]"),
    (put("k_norm_weight", shifted), "k_norm_weight starts at an address that is no", "cuda"),
    (
        put("cos_sin_cache", lambda x: torch.cat((x, x), 1)),
        "cos_sin_cache has 256 columns, expected a multiple of",
    ),
    (put("cos_sin_cache", lambda x: x[:, :3].contiguous()), "cos_sin_cache has 3 columns"),
    (put("cos_sin_cache", lambda x: x[:, :8].contiguous()), "expected a multiple of 16", "cuda"),
    (put("cos_sin_cache", lambda x: x.bfloat16()), "cos_sin_cache has dtype BFloat16"),
    (put("positions", lambda x: x.int()), "positions has dtype Int, expected Long"),
    (put("positions", lambda x: x[1:]), "positions has shape [11], expected [12]"),
    (put("positions", lambda x: x + 50), "but cos_sin_cache has 50 rows", "cpu"),
    (put("positions", lambda x: x - 50), "positions[0] is -", "cpu"),
    (put("cache_loc", lambda x: x + 19), "but the pools have 19 slots", "cpu"),
    (put("cache_loc", lambda x: x - 19), "cache_loc[0] is -", "cpu"),
    (put("cache_loc", lambda x: x[::2]), "cache_loc has shape [6], expected [12]"),
    (put("commit_lens", lambda x: x.long()), "commit_lens has dtype Long, expected Int"),
    (put("commit_lens", lambda x: x[:2]), "expected bs * block_size = 2 * 4"),
    (put("commit_lens", lambda x: x + 1), "commit_lens[0] is 5, expected 0 to block", "cpu"),
    (put("commit_lens", lambda x: x - 5), "commit_lens[0] is -1", "cpu"),
    (lambda x: x.update(block_size=0), "block_size is 0, expected at least 1"),
    (lambda x: x.update(block_size=33), "block_size is 33, expected at most 32", "cuda"),
    (put("k_pools", lambda x: x[:2]), "k_pools has 2 and v_pools 3 tensors, expected one for each"),
    (put("v_pools", lambda x: []), "v_pools 0 tensors"),
    (
        put("v_pools", lambda x: x[..., :64]),
        "v_pools has shape [19, 1, 64], expected [-1, 1, 128] = [slots, kv_heads, head_dim]",
    ),
    (put("k_pools", lambda x: x.double()), "k_pools has dtype Double, expected "),
    (put("k_pools", lambda x: x[..., ::2]), "expected 1 for dimension 2: all but the first"),
    (put("k_pools", lambda x: x[..., :24]), "the pools have head_dim 24, expected a pos", "cpu"),
    (put("k_pools", lambda x: x[..., :32]), "head_dim 32, expected 64, 128 or 256", "cuda"),
]


@pytest.mark.parametrize(("device", "change", "message"), rows(APPEND_ERRORS))
def test_append_context_kv_refuses(device, change, message):
    case = replace(APPEND, dtype=DTYPES[device])
    x = case.inputs()
    change(x)
    before = {name: x[name].clone() for name in ("k_pools", "v_pools") if len(x[name])}
    with refused(device, "append_context_kv", message):
        case.call(ops.append_context_kv, x)
    assert all(torch.equal(x[name], pools) for name, pools in before.items())


CONTEXT_ERRORS = [
    (put("k_pool", lambda x: x.double()), "k_pool has dtype Double, expected "),
    (put("v_pool", lambda x: x.double()), "v_pool has dtype Double, expected "),
    (put("v_pool", lambda x: x[1:]), "= shape of k_pool"),
    (put("k_pool", lambda x: x[0]), "expected [-1, -1, -1] = [slots, kv_heads, head_dim]"),
    (put("v_pool", turned), "v_pool of shape [33, 2, 128] has strides"),
    (put("req_to_token", lambda x: x.long()), "req_to_token has dtype Long, expected Int"),
    (put("req_to_token", lambda x: x[0]), "expected [-1, -1] = [rows, max_len]"),
    (put("req_to_token", lambda x: x[:, ::2]), "req_to_token of shape [4, 13] has strides"),
    (put("req_pool_indices", lambda x: x[:1]), "req_pool_indices has shape [1], expected [2]"),
    (put("req_pool_indices", lambda x: x.int()), "req_pool_indices has dtype Int, expected Long"),
    (put("seq_lens", lambda x: x.float()), "seq_lens has dtype Float, expected Long or Int"),
    (put("req_pool_indices", lambda x: x + 4), "but req_to_token has 4 rows", "cpu"),
    (put("req_pool_indices", lambda x: x - 4), "req_pool_indices[0] is -", "cpu"),
    (put("seq_lens", lambda x: x + 100), "the columns of req_to_token", "cpu"),
    (put("seq_lens", lambda x: x + 2), "req_to_token gives slot 1073741824 for index", "cpu"),
    (put("req_to_token", lambda x: -x - 1), "but the pool has 33 slots", "cpu"),
]
BLOCK_ERRORS = [
    *CONTEXT_ERRORS,
    (put("qkv", lambda x: x.double()), "qkv has dtype Double, expected "),
    (put("qkv", lambda x: x[:-1]), "qkv has shape [7, 1536], expected [8, -1] = [bs * block_size"),
    (put("qkv", lambda x: x[0]), "qkv has shape [1536], expected [8, -1]"),
    (put("qkv", lambda x: x[:, :-8]), "qkv has 1528 columns, expected (q_heads + 2 * kv_heads) *"),
    (put("qkv", lambda x: x[:, : 4 * 128]), "qkv has 512 columns, expected (q_heads + 2 *"),
    (put("qkv", lambda x: x[:, : 11 * 128]), "q_heads a positive multiple of kv_heads"),
    (put("qkv", turned), "qkv of shape [8, 1536] has strides [1, 8]"),
    (put("qkv", lambda x: torch.nn.functional.pad(x, (0, 4))[:, :1536]), "row stride of", "cuda"),
    (lambda x: x.update(block_size=-4), "block_size is -4, expected at least 1"),
    (lambda x: x.update(block_size=33), "block_size is 33, expected at most 32", "cuda"),
    (put("positions", lambda x: x + 100), "positions[0] is 112, but cos_sin_cache has", "cpu"),
    (put("q_norm_weight", lambda x: x[:5]), "q_norm_weight has shape [5], expected [128]"),
    (put("k_norm_weight", lambda x: x.double()), "k_norm_weight has dtype Double, expected "),
    (lambda x: x.update(scale=0.0), "scale is 0, expected a positive number"),
    (lambda x: x.update(schedule=torch.zeros(3).int()), "schedule was given, expected None", "cpu"),
    (lambda x: x.update(schedule=torch.zeros(3).int()), "schedule has shape [3], expected", "cuda"),
    (lambda x: None, "schedule is None; on CUDA, make one a step with block_attention_sc", "cuda"),
]


@pytest.mark.parametrize(("device", "change", "message"), rows(BLOCK_ERRORS))
def test_block_attention_refuses(device, change, message):
    case = AttentionCase((10, 20), block=4, dtype=DTYPES[device])
    x = case.inputs()
    x["qkv"] = x["qkv"][0]
    change(x)
    with refused(device, "block_attention", message):
        case.call(ops.block_attention, x, schedule=x.get("schedule"))


PAGED_ERRORS = [
    *((change, message, "cpu") for change, message, *_ in CONTEXT_ERRORS),
    (put("q", lambda x: x.half()), "q has dtype Half, expected Float or BFloat16", "cpu"),
    (put("q", lambda x: x[:, :5]), "q has 5 heads, expected a positive multiple of the", "cpu"),
    (put("q", lambda x: x[..., :32]), "q has shape [8, 6, 32], expected [-1, -1, 128]", "cpu"),
    (put("q", turned), "q of shape [8, 6, 128]", "cpu"),
    (put("query_start", lambda x: x[1:]), "query_start has shape [2], expected [3]", "cpu"),
    (put("query_start", lambda x: x + 1), "query_start[0] is 1, expected 0", "cpu"),
    (put("query_start", lambda x: x * 2), "query_start[1] and [2] are 8 and 16", "cpu"),
    (put("query_start", lambda x: x.flip(0) - x[-1]), "[0] and [1] are 0 and -4", "cpu"),
    (put("query_start", lambda x: x.float()), "query_start has dtype Float", "cpu"),
    (put("seq_lens", lambda x: x * 0 + 3), "seq_lens[0] is 3, expected at least the", "cpu"),
]


@pytest.mark.parametrize(("device", "change", "message"), rows(PAGED_ERRORS))
def test_paged_attention_refuses(device, change, message):
    case = PagedCase((4, 4), (6, 16), kv_heads=2, head_dim=128)
    x = case.inputs()
    change(x)
    with refused(device, "paged_attention", message):
        case.call(ops.paged_attention, x)


@pytest.mark.skipif(bool(emulated.MISSING), reason=emulated.MISSING)
def test_the_schedule_and_older_architectures_are_refused_by_name():
    case, x = AttentionCase((64,)), AttentionCase((64,)).inputs()
    seven = replace(case, heads=7)
    with (
        emulator(torch.bfloat16, 128).installed(),
        pytest.raises(RuntimeError, match="schedule: 7 query heads are no multiple of 2 KV heads"),
    ):
        seven.schedule(x)
    expected = r"has compute capability 7\.0, the kernels need 8\.0 or later"
    with emulator(torch.bfloat16, 128).installed(capability=7):
        with pytest.raises(RuntimeError, match=f"block_attention_schedule: cpu {expected}"):
            case.schedule(x)
        with pytest.raises(RuntimeError, match=f"append_context_kv: cpu {expected}"):
            AppendCase().call(ops.append_context_kv, AppendCase().inputs())
