"""The attention kernels of SGLang's Triton backend, for `--attention-backend triton`.

The interpreter would take a second a launch for them and gets bfloat16 products wrong.
"""

import torch

from .reference_math import attend
from .table import launch, stand_in


def install() -> None:
    """Replace the launchers, which the backend imports when it is built."""
    from sglang.kernels.ops.attention import decode_attention, extend_attention

    decode_attention.decode_attention_fwd = _launch_decode
    extend_attention.extend_attention_fwd = _launch_extend


def _launch_decode(
    q,
    k_buffer,
    v_buffer,
    o,
    kv_indptr,
    kv_indices,
    attn_logits,
    attn_lse,
    num_kv_splits,
    max_kv_splits,
    sm_scale,
    k_scale,
    v_scale,
    logit_cap=0.0,
    sinks=None,
    **more,
) -> None:
    assert sinks is None and more.get("score_mod") is None
    launch(
        *("triton::decode_attention_fwd", o, q, k_buffer, v_buffer),
        *(kv_indptr, kv_indices, sm_scale, logit_cap),
    )


@stand_in("triton::decode_attention_fwd", writes="o")
def _decode(o, q, k_buffer, v_buffer, indptr, indices, scale, cap) -> None:
    ends = indptr.tolist()
    for b in range(len(q)):
        rows = indices[ends[b] : ends[b + 1]].long()
        visible = torch.ones(1, len(rows), dtype=torch.bool)
        result, _ = attend(q[b : b + 1], k_buffer[rows], v_buffer[rows], visible, scale, cap)
        o[b : b + 1] = result.to(o.dtype)


def _launch_extend(
    q_extend,
    k_extend,
    v_extend,
    o_extend,
    k_buffer,
    v_buffer,
    qo_indptr,
    kv_indptr,
    kv_indices,
    custom_mask,
    is_causal,
    mask_indptr,
    max_len_extend,
    k_scale,
    v_scale,
    sm_scale=None,
    logit_cap=0.0,
    skip_prefix_custom_mask=True,
    sliding_window_size=-1,
    sinks=None,
    lse_extend=None,
    **more,
) -> None:
    assert sinks is None and lse_extend is None and more.get("score_mod") is None
    assert custom_mask is None or (skip_prefix_custom_mask and sliding_window_size <= 0)
    launch(
        *("triton::extend_attention_fwd", o_extend, q_extend, k_extend, v_extend),
        *(k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, is_causal),
        *(sm_scale or q_extend.shape[-1] ** -0.5, logit_cap, sliding_window_size),
        *(custom_mask, mask_indptr),
    )


@stand_in("triton::extend_attention_fwd", writes="o")
def _extend(
    o,
    q,
    k_new,
    v_new,
    k_buffer,
    v_buffer,
    qo,
    indptr,
    indices,
    causal,
    scale,
    cap,
    window,
    mask,
    mask_indptr,
) -> None:
    starts, ends = qo.tolist(), indptr.tolist()
    for b in range(len(starts) - 1):
        new = slice(starts[b], starts[b + 1])
        m = new.stop - new.start
        if m <= 0:
            continue
        rows = indices[ends[b] : ends[b + 1]].long()
        k = torch.cat([k_buffer[rows].to(k_new.dtype), k_new[new]])
        v = torch.cat([v_buffer[rows].to(v_new.dtype), v_new[new]])
        distance = torch.arange(m)[:, None] + len(rows) - torch.arange(len(k))[None]
        visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window > 0:
            visible = visible & (distance <= window)
        if mask is not None:  # a matrix [m, len(k)] a request, of which the prefix is not read
            first = int(mask_indptr[b])
            own = mask[first : first + m * len(k)].view(m, len(k))[:, len(rows) :]
            visible = torch.cat((torch.ones(m, len(rows), dtype=torch.bool), own.bool()), 1)
        o[new] = attend(q[new], k, v, visible, scale, cap)[0].to(o.dtype)
