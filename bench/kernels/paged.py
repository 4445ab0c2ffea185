"""paged_attention, on a CPU alone: the target's attention, to decode, to verify, to prefill.

Arms: `dflare`; `eager`, its reference in plain PyTorch; `sdpa`, which gathers each request's keys
and values and calls scaled_dot_product_attention.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.timing import Arm, Case, buffer_sets, kept_going, relative_error
from dflare import ops

ARMS = ("dflare", "eager", "sdpa")


def make_set(pair: Any, batch: int, queries: int, context: int, dtype: torch.dtype) -> dict:
    """Arguments of the operator; every token in a random slot."""
    length = context + queries
    slots = batch * length
    pools = (torch.randn(slots, pair.kv_heads, pair.head_dim).to(dtype) for _ in range(2))
    return {
        "q": torch.randn(batch * queries, pair.heads, pair.head_dim).to(dtype),
        **dict(zip(("k_pool", "v_pool"), pools, strict=True)),
        "req_to_token": torch.randperm(slots).int().view(batch, length),
        "req_pool_indices": torch.arange(batch),
        "seq_lens": torch.full((batch,), length),
        "query_start": torch.arange(batch + 1) * queries,
        "window": -1,
        "causal": True,
        "scale": pair.head_dim**-0.5,
        "logit_cap": 0.0,
    }


def call(op: Callable[..., Tensor], x: dict[str, Any]) -> Tensor:
    """The operator or its reference on a set of buffers."""
    context = ops.PagedContext(*(x[name] for name in ops.PagedContext._fields))
    names = ("query_start", "window", "causal", "scale", "logit_cap")
    return op(x["q"], context, *(x[name] for name in names))


def with_sdpa(x: dict[str, Any], queries: int) -> Tensor:
    length = x["req_to_token"].shape[1]
    mask = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    outs = []
    for q, slots in zip(x["q"].split(queries), x["req_to_token"].long(), strict=True):
        heads = (t.transpose(0, 1)[None] for t in (q, x["k_pool"][slots], x["v_pool"][slots]))
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=mask if queries > 1 else None, scale=x["scale"], enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs).flatten(1)


def case(
    pair: Any, batch: int, queries: int, context: int, dtype: torch.dtype, cold: bool = True
) -> Case:
    """One layer's attention: `queries` is 1 to decode, the block to verify, a prompt to prefill."""
    torch.manual_seed(0)
    tokens = batch * (2 * pair.kv_heads * (context + queries) + 2 * pair.heads * queries)
    keys = context + (queries + 1) / 2
    flops = 4 * batch * queries * pair.heads * keys * pair.head_dim
    work = tokens * pair.head_dim * dtype.itemsize, flops
    count = buffer_sets("cpu", work[0]) if cold else 1
    sets = [make_set(pair, batch, queries, context, dtype) for _ in range(count)]

    def check(arms: list[Arm]) -> None:
        exact = {
            name: value.double() if name in ("q", "k_pool", "v_pool") else value
            for name, value in sets[0].items()
        }
        expected = call(ops.paged_attention_reference, exact)
        for arm in arms:
            with kept_going(arm):
                arm.error = relative_error([arm.run(0)], [expected])

    makers: dict[str, Callable[[], Arm]] = {
        "dflare": lambda: Arm("dflare", lambda i: call(ops.paged_attention, sets[i]), work),
        "eager": lambda: Arm("eager", lambda i: call(ops.paged_attention_reference, sets[i]), work),
        "sdpa": lambda: Arm("sdpa", lambda i: with_sdpa(sets[i], queries), work),
    }
    shape = {"batch": batch, "queries": queries, "context": context}
    return Case("paged_attention", shape, makers, check, count)
