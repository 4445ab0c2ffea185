"""Attention of a target over its paged cache on the CPU: prefill, decode and verify."""

import torch
from torch import Tensor

from dflare.ops.draft_tree import tree_ancestors
from dflare.ops.paged_context import PagedContext
from dflare.ops.reference_math import attend, visibility


def paged_attention(
    q: Tensor,
    context: PagedContext,
    query_start: Tensor,
    window: int,
    causal: bool,
    scale: float,
    logit_cap: float,
    parents: Tensor | None = None,
) -> Tensor:
    """Attention of each request's last tokens over all its tokens, read through the page table.

    Request b's queries are rows query_start[b] .. query_start[b + 1] - 1 and are the last of its
    seq_lens[b] tokens, whose keys and values are already in the pool. Rows of `q` from
    query_start[bs] on are padding: their output is zero. Key j is visible to query i iff
    (window < 0 or j >= i - window) and (not causal or j <= i), i and j counted from the request's
    first token. It serves the CPU, as SGLang's `torch_native` attention backend does.

    With `parents` the queries of a request are the nodes of a tree: the first is its root, and each
    sees what is before the root, its ancestors and itself. A node counts as the token that follows
    its parent, for the window as for the order of sums: its output is that of the last query of a
    chain of its ancestors.

    Args:
        q: [Nq, HQ, hd], float32 or bfloat16; the last two dimensions contiguous.
        context: pools in q's dtype; lengths include the queries.
        query_start: [bs + 1] int64 or int32, non-decreasing.
        window: sliding window in tokens, negative for none.
        causal: whether later tokens are hidden from a query.
        scale: factor of the logits, usually hd ** -0.5.
        logit_cap: when positive, logits become cap * tanh(logits / cap).
        parents: [Nq] int32, which earlier query of the request, counted from its first, is the
            parent; -1 for the first. None for chains. With it `causal` must be true.

    Returns:
        [Nq, HQ * hd] in q's dtype.

    Raises:
        RuntimeError: a shape, dtype, device, stride or slot that does not fit.
    """
    return torch.ops.dflare.paged_attention.default(
        q,
        *context,
        query_start,
        window,
        causal,
        scale,
        logit_cap,
        *(() if parents is None else (parents,)),
    )


@torch.library.register_fake("dflare::paged_attention")
def _fake(q: Tensor, *others: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])


def paged_attention_reference(
    q: Tensor,
    context: PagedContext,
    query_start: Tensor,
    window: int,
    causal: bool,
    scale: float,
    logit_cap: float,
    parents: Tensor | None = None,
) -> Tensor:
    """`paged_attention` in plain PyTorch, on any device and in any floating dtype."""
    out = torch.zeros_like(q)
    starts = query_start.tolist()
    for request, length in enumerate(context.seq_lens.tolist()):
        rows = slice(starts[request], starts[request + 1])
        slots = context.slots(request, length)
        index = torch.arange(length, device=q.device)
        first = length - (rows.stop - rows.start)
        if parents is None:
            visible = visibility(index[first:], index, window, causal)
        else:
            ancestors = tree_ancestors(parents[None, rows])[0]
            place = first + ancestors.sum(-1) - 1  # in a chain of the ancestors
            visible = visibility(place, torch.cat([index[:first], place]), window, causal)
            visible[:, first:] &= ancestors
        keys, values = context.k_pool[slots], context.v_pool[slots]
        out[rows] = attend(q[rows], keys, values, visible, scale, logit_cap)
    return out.flatten(1)
