"""What does not fit raises: operator, argument, what was given, what was expected."""

import re
from collections.abc import Callable

import pytest
import torch
from op_cases import Case, append_case, block_case, copied, paged_case

from dflare.ops import append_context_kv, block_attention, paged_attention

Change = Callable[[Case], object]


def check(function: Callable, case: Case, change: Change, message: str) -> None:
    before = copied(case)
    change(case)
    with pytest.raises(RuntimeError, match=re.escape(message)) as error:
        function(**case)
    assert str(error.value).startswith(function.__name__ + ": ")
    for name in ("k_pools", "v_pools"):
        for old, new in zip(before.get(name, []), case.get(name, []), strict=False):
            assert old.shape != new.shape or torch.equal(old, new.to(old.dtype))


def put(name: str, value: Callable) -> Change:
    return lambda case: case.update({name: value(case[name])})


APPEND = [
    (put("target_hidden", lambda x: x.half()), "k_pools has dtype Float, expected Half"),
    (put("target_hidden", lambda x: x[0]), "target_hidden has shape [4032], expected [-1, 4032]"),
    (
        put("target_hidden", lambda x: x[:, 1:]),
        "target_hidden has shape [12, 4031], expected [-1, 4032] = [N, taps * hidden]",
    ),
    (
        put("target_hidden", lambda x: x.t().contiguous().t()),
        "target_hidden of shape [12, 4032] has strides [1, 12], expected 1 for dimension 1",
    ),
    (put("fusion_probs", lambda x: x.double()), "fusion_probs has dtype Double, expected Float"),
    (put("fusion_probs", lambda x: x[:0]), "fusion_probs has shape [0, 7]"),
    (put("fusion_probs", lambda x: x[:2]), "k_pools has 3 tensors, expected one for each of the 2"),
    (put("norm_weight", lambda x: x[:5]), "target_hidden has shape [12, 4032], expected [-1, 35]"),
    (put("norm_weight", lambda x: x.bfloat16()), "norm_weight has dtype BFloat16, expected Float"),
    (put("kv_weight", lambda x: x[:, 1:]), "kv_weight has shape [3, 383, 576], expected [3, 384,"),
    (put("kv_weight", lambda x: x.bfloat16()), "kv_weight has dtype BFloat16, expected Float"),
    (
        put("kv_weight", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        "kv_weight of shape [3, 384, 576] has strides",
    ),
    (put("kv_bias", lambda x: x[:, 1:]), "kv_bias has shape [3, 383], expected [3, 384]"),
    (put("k_norm_weight", lambda x: x[:1]), "k_norm_weight has shape [1, 64], expected [3, 64]"),
    (
        put("cos_sin_cache", lambda x: torch.cat((x, x), 1)),
        "cos_sin_cache has 128 columns, expected an even rotary dimension of at most head_dim = 64",
    ),
    (put("cos_sin_cache", lambda x: x[:, :3].contiguous()), "cos_sin_cache has 3 columns"),
    (put("cos_sin_cache", lambda x: x.bfloat16()), "cos_sin_cache has dtype BFloat16"),
    (put("positions", lambda x: x.int()), "positions has dtype Int, expected Long"),
    (put("positions", lambda x: x[1:]), "positions has shape [11], expected [12]"),
    (put("positions", lambda x: x + 512), "but cos_sin_cache has 512 rows"),
    (put("positions", lambda x: x - 512), "positions[0] is -"),
    (put("cache_loc", lambda x: x + 17), "but the pools have 17 slots"),
    (put("cache_loc", lambda x: x - 17), "cache_loc[0] is -"),
    (put("cache_loc", lambda x: x[::2]), "cache_loc has shape [6], expected [12]"),
    (put("commit_lens", lambda x: x.long()), "commit_lens has dtype Long, expected Int"),
    (put("commit_lens", lambda x: x[:2]), "expected bs * block_size = 2 * 4"),
    (put("commit_lens", lambda x: x + 1), "commit_lens[0] is 5, expected 0 to block_size = 4"),
    (put("commit_lens", lambda x: x - 5), "commit_lens[0] is -1"),
    (put("block_size", lambda x: 0), "expected bs * block_size = 3 * 0"),
    (put("k_pools", lambda x: x[:2]), "k_pools has 2 tensors"),
    (put("v_pools", lambda x: []), "v_pools has 0 tensors"),
    (
        put("v_pools", lambda x: [p[:, :2] for p in x]),
        "v_pools has shape [17, 2, 64], expected [-1, 3, 64]",
    ),
    (
        put("k_pools", lambda x: [p.transpose(1, 2).contiguous().transpose(1, 2) for p in x]),
        "k_pools of shape [17, 3, 64] has strides [192, 1, 3], expected 1 for dimension 2",
    ),
    (
        put("k_pools", lambda x: [p[..., :24].contiguous() for p in x]),
        "the pools have head_dim 24, expected a positive multiple of 16",
    ),
]


@pytest.mark.parametrize(("change", "message"), APPEND, ids=[m for _, m in APPEND])
def test_append_context_kv_refuses(change, message):
    case = append_case(0, commit_lens=[4, 4, 4], block_size=4, bias=True)
    check(append_context_kv, case, change, message)


ATTENTION = [
    (put("k_pool", lambda x: x.bfloat16()), "k_pool has dtype BFloat16, expected Float"),
    (put("v_pool", lambda x: x.bfloat16()), "v_pool has dtype BFloat16, expected Float"),
    (put("v_pool", lambda x: x[1:]), "expected [33, 3, 64] = shape of k_pool"),
    (put("k_pool", lambda x: x[0]), "k_pool has shape [3, 64], expected [-1, -1, -1] = [slots, kv"),
    (
        put("v_pool", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        "v_pool of shape [33, 3, 64] has strides",
    ),
    (put("req_to_token", lambda x: x.long()), "req_to_token has dtype Long, expected Int"),
    (put("req_to_token", lambda x: x[0]), "expected [-1, -1] = [rows, max_len]"),
    (put("req_to_token", lambda x: x[:, ::2]), "has strides"),
    (put("req_pool_indices", lambda x: x + 4), "but req_to_token has 4 rows"),
    (put("req_pool_indices", lambda x: x - 4), "req_pool_indices[0] is -"),
    (put("req_pool_indices", lambda x: x[:1]), "req_pool_indices has shape [1], expected [2]"),
    (put("req_pool_indices", lambda x: x.int()), "req_pool_indices has dtype Int, expected Long"),
    (put("seq_lens", lambda x: x.float()), "seq_lens has dtype Float, expected Long or Int"),
    (put("seq_lens", lambda x: x + 100), "the columns of req_to_token"),
    (put("seq_lens", lambda x: x + 2), "req_to_token gives slot 1073741824 for index"),
    (put("req_to_token", lambda x: -x - 1), "but the pool has 33 slots"),
]
BLOCK = [
    *ATTENTION,
    (put("qkv", lambda x: x.double()), "k_pool has dtype Float, expected Double"),
    (put("qkv", lambda x: x[:-1]), "qkv has 7 rows, expected bs * block_size = 2 * 4"),
    (put("qkv", lambda x: x[0]), "qkv has shape [960], expected [-1, -1]"),
    (put("qkv", lambda x: x[:, :-1]), "qkv has 959 columns, expected (q_heads + 2 * kv_heads) *"),
    (put("qkv", lambda x: x[:, : 6 * 64]), "qkv has 384 columns, expected (q_heads + 2 *"),
    (put("qkv", lambda x: x[:, : 13 * 64]), "q_heads a positive multiple of kv_heads"),
    (put("qkv", lambda x: x.t().contiguous().t()), "qkv of shape [8, 960] has strides [1, 8]"),
    (put("block_size", lambda x: -4), "expected bs * block_size = 2 * -4"),
    (put("positions", lambda x: x + 100), "positions[0] is 110, but cos_sin_cache has"),
    (put("q_norm_weight", lambda x: x[:5]), "q_norm_weight has shape [5], expected [64]"),
    (put("k_norm_weight", lambda x: x.half()), "k_norm_weight has dtype Half, expected Float"),
    (
        lambda case: case.update(schedule=torch.zeros(3, dtype=torch.int32)),
        "schedule was given, expected None on the CPU",
    ),
]
PAGED = [
    *ATTENTION,
    (put("q", lambda x: x.half()), "k_pool has dtype Float, expected Half"),
    (put("q", lambda x: x[:, :8]), "q has 8 heads, expected a positive multiple of the pool's 3"),
    (put("q", lambda x: x[..., :32]), "q has shape [8, 9, 32], expected [-1, -1, 64]"),
    (put("q", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), "q of shape [8, 9, 64]"),
    (put("query_start", lambda x: x[1:]), "query_start has shape [2], expected [3] = [bs + 1]"),
    (put("query_start", lambda x: x + 1), "query_start[0] is 1, expected 0"),
    (put("query_start", lambda x: x * 2), "query_start[1] and [2] are 8 and 16"),
    (put("query_start", lambda x: x.flip(0) - x[-1]), "query_start[0] and [1] are 0 and -4"),
    (put("query_start", lambda x: x.float()), "query_start has dtype Float"),
    (put("seq_lens", lambda x: x * 0 + 3), "seq_lens[0] is 3, expected at least the request's 4"),
]


@pytest.mark.parametrize(("change", "message"), BLOCK, ids=[m for _, m in BLOCK])
def test_block_attention_refuses(change, message):
    check(block_attention, block_case(0, seq_lens=[10, 20], block_size=4), change, message)


@pytest.mark.parametrize(("change", "message"), PAGED, ids=[m for _, m in PAGED])
def test_paged_attention_refuses(change, message):
    case = paged_case(0, queries=[4, 4], contexts=[6, 16])
    check(paged_attention, case, change, message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_without_a_cpu_kernel_are_refused(dtype):
    for function, case in (
        (append_context_kv, append_case(0, dtype=dtype)),
        (block_attention, block_case(0, dtype=dtype, seq_lens=[3])),
        (paged_attention, paged_case(0, dtype=dtype, queries=[1], contexts=[3])),
    ):
        with pytest.raises(RuntimeError, match="expected Float or BFloat16"):
            function(**case)
