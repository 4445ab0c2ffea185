"""Attention backend `dflare`: the draft's block attention, on every device."""

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from dflare import ops


class BlockAttentionBackend(AttentionBackend):
    """A backend that runs a DFlare layer's norm, RoPE and attention over a block as one op."""

    def __init__(self, model_runner) -> None:
        super().__init__()
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool

    def block_attention(
        self,
        attention: Any,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """Attend every request's block to its paged context and to itself.

        Args:
            attention: the `DFlareAttention` module (norms, rotary table, window, scale).
            qkv: [bs * B, (HQ + 2 * KV) * hd] projections of the block, before norm and RoPE.
            positions: [bs * B] int64, absolute positions, used for RoPE only.
            forward_batch: `seq_lens` [bs] are the context lengths before the block.

        Returns:
            [bs * B, HQ * hd].
        """
        layer = attention.attn
        q_norm, k_norm = attention.q_norm, attention.k_norm
        return ops.block_attention(
            qkv,
            ops.BlockNorms(q_norm.weight, k_norm.weight, q_norm.variance_epsilon),
            attention.rotary_emb.cos_sin_cache,
            positions,
            self._context(layer, forward_batch, forward_batch.seq_lens),
            block_size=qkv.shape[0] // max(1, forward_batch.batch_size),
            window=layer.sliding_window_size,
            causal=layer.attn_type == AttentionType.DECODER,
            scale=layer.scaling,
            schedule=self.block_schedule(layer),
        )

    def _context(
        self, layer: RadixAttention, forward_batch: ForwardBatch, seq_lens: torch.Tensor
    ) -> ops.PagedContext:
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        return ops.PagedContext(
            keys, values, self.req_to_token, forward_batch.req_pool_indices, seq_lens
        )

    def block_schedule(self, layer: RadixAttention) -> torch.Tensor | None:
        """The step's split of the context over thread blocks; a CPU needs none."""
        return None
