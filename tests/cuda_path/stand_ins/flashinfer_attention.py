"""FlashInfer's paged attention of several queries a request, a draft backend of SGLang's.

The compiled module alone is replaced. FlashInfer's wrapper, SGLang's own plan for captured graphs
and all index tensors are theirs. A plan writes what it was made for into the workspace that the
kernel reads, so a launch with longer contexts than its plan is an error here.
"""

import torch

from .reference_math import attend
from .table import launch, stand_in

_CAUSAL = 1  # flashinfer.utils.MaskMode; 0: every key is visible


class _Module:
    """What `get_batch_prefill_module` compiles."""

    def plan(
        self, _float, workspace, pinned, _queries, _indptr, lens, _rows, batch_size, *_
    ) -> list[int]:
        made_for = pinned.view(torch.int32)[:batch_size]
        made_for.copy_(lens)
        workspace.view(torch.int32)[:batch_size].copy_(made_for, non_blocking=True)
        return [batch_size]

    def paged_run(
        self,
        _float,
        workspace,
        plan,
        q,
        k,
        v,
        queries,
        indptr,
        indices,
        last_page_len,
        out,
        lse,
        mask,
        _layout,
        window,
        _pdl,
        custom_mask,
        _mask_indptr,
        _alibi,
        _prefix,
        _token_pos,
        _max_item,
        soft_cap,
        scale,
        *_,
    ) -> None:
        if custom_mask is not None or lse is not None or k.shape[1:-2] not in ((), (1,)):
            raise NotImplementedError(
                "the stand-in of FlashInfer's attention takes pages of one slot, no custom mask "
                "and returns no log sums"
            )
        made_for = workspace.view(torch.int32)[: plan[0]]
        launch(
            *("flashinfer::batch_prefill_paged", out, q, k, v, made_for, queries, indptr, indices),
            *(mask, window, soft_cap, scale),
        )


def install() -> None:
    """Replace the compiler where the wrapper's `plan` asks for its module."""
    import flashinfer.prefill

    flashinfer.prefill.get_batch_prefill_module = lambda *_: _Module()


@stand_in("flashinfer::batch_prefill_paged", writes="out")
def _attend(
    out, q, k, v, made_for, queries, indptr, indices, mask, window, soft_cap, scale
) -> None:
    starts, ends = queries.tolist(), indptr.tolist()
    pools = [x.flatten(0, -3) for x in (k, v)]
    for b, planned in enumerate(made_for.tolist()):
        new = slice(starts[b], starts[b + 1])
        rows, count = indices[ends[b] : ends[b + 1]].long(), new.stop - new.start
        assert planned >= len(rows), (
            f"FlashInfer: request {b} was planned for {planned} tokens and has {len(rows)}"
        )
        if not count:
            continue
        distance = torch.arange(count)[:, None] + len(rows) - count - torch.arange(len(rows))[None]
        visible = distance >= 0 if mask == _CAUSAL else torch.ones_like(distance, dtype=torch.bool)
        if window >= 0:
            visible = visible & (distance <= window)
        keys, values = (pool[rows] for pool in pools)
        out[new] = attend(q[new], keys, values, visible, scale, soft_cap)[0].to(out.dtype)
