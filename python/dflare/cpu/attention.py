"""Attention backend `dflare` on a CPU: the draft's blocks, and all that the target does."""

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch.nn.functional import pad

from dflare import ops
from dflare.engine.attention import BlockAttentionBackend
from dflare.engine.names import ATTENTION_BACKEND


class CpuAttentionBackend(BlockAttentionBackend):
    """Prefill, decode and verify of the target, and the draft's blocks, on a CPU.

    All modes are one op: the queries of request b are the last `query_lens[b]` of its
    `seq_lens[b]` tokens, whose K/V are already in the pool.

    Attributes:
        query_start: [bs + 1] of the batch, as `ops.paged_attention` takes it.
        parents: of the batch's trees, or None.
    """

    def __init__(self, model_runner) -> None:
        super().__init__(model_runner)
        self._seq_lens = self.query_start = torch.empty(0, dtype=torch.int64)
        self.parents: torch.Tensor | None = None  # of a tree's nodes

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        mode, bs = forward_batch.forward_mode, forward_batch.batch_size
        if mode.is_idle():
            return
        self.parents = None
        if mode.is_decode():
            self._seq_lens = forward_batch.seq_lens
            self.query_start = torch.arange(bs + 1)
        elif mode.is_target_verify():
            if forward_batch.spec_info.custom_mask is not None:
                raise NotImplementedError(
                    f"the CPU attention backend {ATTENTION_BACKEND!r} got a mask for a tree of "
                    "drafts; it verifies chains, and trees that tell their nodes' parents. Use "
                    "--speculative-algorithm DFLARE, or serve this on a GPU"
                )
            self.parents = getattr(forward_batch.spec_info, "parents", None)
            width = forward_batch.spec_info.draft_token_num
            counts = getattr(forward_batch.spec_info, "counts", None)
            counts = torch.full((bs,), width) if counts is None else counts
            self._seq_lens = forward_batch.seq_lens + counts
            self.query_start = pad(counts.cumsum(0), (1, 0))
        else:
            self._seq_lens = forward_batch.seq_lens
            self.query_start = torch.zeros(bs + 1, dtype=torch.int64)
            torch.cumsum(forward_batch.extend_seq_lens, 0, out=self.query_start[1:])

    def support_triton(self) -> bool:
        return False

    def get_verify_buffers_to_fill_after_draft(self) -> list[None]:
        return [None, None]

    def update_verify_buffers_to_fill_after_draft(self, spec_info, cuda_graph_bs) -> None:
        pass

    def queries(self, layer: RadixAttention, forward_batch: ForwardBatch) -> ops.PagedContext:
        """Where the batch's queries and what they see lie, in the pools of a layer."""
        return self._context(layer, forward_batch, self._seq_lens)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        **kwargs,
    ) -> torch.Tensor:
        unsupported = sorted(name for name, value in kwargs.items() if value is not None)
        if unsupported or layer.is_cross_attention or layer.v_head_dim != layer.qk_head_dim:
            raise NotImplementedError(
                f"the CPU attention backend {ATTENTION_BACKEND!r} got "
                f"{unsupported or 'cross attention or differing K and V head sizes'}; it supports "
                "plain multi-head and grouped-query attention. Serve this target on a GPU"
            )
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(
                layer,
                KVWriteLoc(forward_batch.out_cache_loc, None),
                k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
                v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            )
        return ops.paged_attention(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.queries(layer, forward_batch),
            self.query_start,
            window=layer.sliding_window_size,
            causal=layer.attn_type != AttentionType.ENCODER_ONLY,
            scale=layer.scaling,
            logit_cap=layer.logit_cap,
            parents=self.parents,
        )
