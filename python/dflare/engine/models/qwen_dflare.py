"""The DFlare drafter (arXiv 2606.02091) with SGLang's layers, tensor parallel, strictly loaded.

Interface as `DFlashWorkerV2` expects it of sglang/srt/models/dflash.py. What differs from DFlash:
no `fc`; every layer has its own mix of the tapped target states and its own context projections,
all layers' context projections live in one stacked parameter, as `append_context_kv` reads them.
"""

from collections.abc import Iterable
from typing import cast

import torch
from sglang.srt.configs.draft_parallel import DraftParallelSpec, DraftTPExecution
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.models.utils import apply_qk_norm
from sglang.srt.runtime_context import get_parallel, get_spec
from torch import nn

from dflare.checkpoint.config import DraftConfig
from dflare.checkpoint.folder import find_folder
from dflare.checkpoint.reader import read_config
from dflare.engine.attention import BlockAttentionBackend
from dflare.engine.models.loading import load_strictly


class DFlareAttention(nn.Module):
    """Attention of one drafter layer: block queries over [context K/V ; block K/V].

    With the `dflare` backend the block's q/k norm, RoPE and attention are one op and the block's
    K/V never reach the pool. Stock backends get them normed and rotated and keep them in the
    block's slots, where the verified tokens' context K/V overwrite them afterwards.
    """

    def __init__(self, config: DraftConfig, layer_id: int, quant_config=None) -> None:
        super().__init__()
        tp_size = get_parallel().tp_size
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // tp_size
        self.num_kv_heads = max(1, config.num_key_value_heads // tp_size)
        self.scaling = self.head_dim**-0.5
        self.qkv_proj = QKVParallelLinear(
            hidden_size=config.hidden_size,
            head_size=self.head_dim,
            total_num_heads=config.num_attention_heads,
            total_num_kv_heads=config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            quant_config=quant_config,
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            self.head_dim,
            rotary_dim=self.head_dim,
            max_position=config.max_position_embeddings,
            base=config.rope.theta,
            rope_scaling=config.rope.scaling,
            is_neox_style=True,
            partial_rotary_factor=config.rope.partial_rotary_factor,
        )
        # As in SGLang's DFLASH, a sliding layer is causal inside the block, a full one is not.
        window = config.window(layer_id)
        self.attn = RadixAttention(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            scaling=self.scaling,
            num_kv_heads=self.num_kv_heads,
            layer_id=layer_id,
            sliding_window_size=window,
            attn_type=AttentionType.ENCODER_ONLY if window < 0 else AttentionType.DECODER,
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """[bs * B, H] normed block states -> [bs * B, H] attention output."""
        qkv, _ = self.qkv_proj(hidden_states)
        backend = get_attn_backend()
        if isinstance(backend, BlockAttentionBackend):
            attended = backend.block_attention(self, qkv, positions, forward_batch)
        else:
            q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
            q, k = apply_qk_norm(q, k, self.q_norm, self.k_norm, self.head_dim)
            q, k = self.rotary_emb(positions, q, k)
            attended = self.attn(q, k, v, forward_batch)
        output, _ = self.o_proj(attended)
        return output


class DFlareMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DraftConfig, quant_config=None) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=False, quant_config=quant_config
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act_fn(gate_up))
        return x


class DFlareDecoderLayer(nn.Module):
    """Pre-norm attention and MLP with the residual carried beside the hidden states."""

    def __init__(self, config: DraftConfig, layer_id: int, quant_config=None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DFlareAttention(config, layer_id, quant_config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DFlareMLP(config, quant_config)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: ForwardBatch,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, forward_batch)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class QwenDFlareDraftModel(nn.Module):
    """The drafter; named as the checkpoints' `architectures` entry, by which SGLang finds it.

    Besides SGLang's layers it holds what `append_context_kv` reads:

    - `context_kv_proj` [D, 2 * KV * hd, H]: this rank's `k_proj_target` rows, then `v_proj_target`.
    - `context_kv_bias` [D, 2 * KV * hd] where the checkpoint has attention biases.
    - `fusion_probs` [D, T] float32: softmax of `layer_fusion_weights` over the taps.

    and, where the checkpoint has a draft vocabulary, `d2t` [V'] int64 (`engine/draft_head.py`).
    """

    draft_parallel_spec = DraftParallelSpec(tp_execution=DraftTPExecution.SINGLE_GROUP)
    # What `DFlashWorkerV2` asks of a draft model and a DFlare drafter does not have.
    supports_fused_context_kv = False
    is_nemotron_35_draft = False
    candidate_selector = None
    lilicorr = None

    def __init__(self, config, quant_config=None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        spec = get_spec()
        folder = find_folder(
            spec.speculative_draft_model_path, revision=spec.speculative_draft_model_revision
        )
        self.draft_config = draft = read_config(folder)
        self.block_size = draft.block_size
        layers = [
            DFlareDecoderLayer(draft, i, quant_config) for i in range(draft.num_hidden_layers)
        ]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(draft.hidden_size, eps=draft.rms_norm_eps)
        self.hidden_norm = RMSNorm(draft.hidden_size, eps=draft.rms_norm_eps)
        depth, taps = draft.num_hidden_layers, draft.num_taps
        context_rows = 2 * layers[0].self_attn.num_kv_heads * draft.head_dim
        self.layer_fusion_weights = nn.Parameter(torch.empty(depth, taps), requires_grad=False)
        self.context_kv_proj = nn.Parameter(
            torch.empty(depth, context_rows, draft.hidden_size), requires_grad=False
        )
        self.context_kv_bias = (
            nn.Parameter(torch.empty(depth, context_rows), requires_grad=False)
            if draft.attention_bias
            else None
        )
        if draft.draft_vocab_size is not None:
            ids = torch.empty(draft.draft_vocab_size, dtype=torch.int64)
            self.d2t = nn.Parameter(ids, requires_grad=False)
        self.fusion_probs = nn.Buffer(
            torch.empty(depth, taps, dtype=torch.float32), persistent=False
        )
        self.k_norm_weights = nn.Buffer(torch.empty(depth, draft.head_dim), persistent=False)

    def set_block_size(self, block_size: int) -> None:
        """Adopt the verify width that the worker settled on."""
        self.block_size = int(block_size)

    def get_attention_sliding_window_size(self) -> int | None:
        """Window of the sliding layers without the query's own token; None where none slides."""
        window = max(self.draft_config.window(i) for i in range(len(self.layers)))
        return None if window < 0 else window

    def get_input_embeddings(self) -> None:
        """The drafter borrows the target's embedding."""
        return None

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        get_embedding: bool = False,
        pp_proxy_tensors=None,
    ) -> LogitsProcessorOutput:
        """Final hidden states [bs * B, H] of the blocks whose embeddings are given."""
        if input_embeds is None:
            raise ValueError("DFLARE: the drafter has no embedding; pass the target's input_embeds")
        dtype = self.norm.weight.dtype
        if input_embeds.dtype != dtype and forward_batch.input_embeds is not None:
            # SGLang 0.5.23 rounds embeddings to bfloat16 on their way here, whatever the model's
            # dtype (`ModelRunner`, extend kwargs); the batch still has them as they were.
            input_embeds = forward_batch.input_embeds
        hidden_states = input_embeds.to(dtype)
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, forward_batch, residual)
        if hidden_states.shape[0] > 0:
            hidden_states, _ = self.norm(hidden_states, residual)
        return LogitsProcessorOutput(next_token_logits=None, hidden_states=hidden_states)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load an AngelSlim checkpoint; every tensor must be taken and every parameter filled.

        Raises:
            CheckpointError: naming each tensor that is unknown, missing or misshapen.
        """
        load_strictly(self, weights)
        self.fusion_probs.copy_(torch.softmax(self.layer_fusion_weights.float(), dim=-1))
        for i, layer in enumerate(self.layers):
            self.k_norm_weights[i].copy_(cast(DFlareDecoderLayer, layer).self_attn.k_norm.weight)


EntryClass = QwenDFlareDraftModel
