"""The drafter in plain PyTorch: DFlare (arXiv 2606.02091), and DFlash, which it grew from.

This is the model that trains, and the reference that the engine is held against. Each of the D
draft layers attends over the context, K/V made from the target's hidden states, and over the block
itself. The two architectures differ in how the T tapped states of a token become its context:

* ``dflash``: one state for all layers, RMSNorm(fc [h_1; ...; h_T]), projected by the layer's own
  ``k_proj`` and ``v_proj``;
* ``dflare``: one state a layer, RMSNorm(sum_t p[d, t] h_t) with p = softmax of learned logits,
  projected by ``k_proj_target`` and ``v_proj_target``. With ``shared_kv`` (the paper's ablation)
  it is projected by ``k_proj`` and ``v_proj`` as in DFlash.

Weights are float32 masters; under autocast the products run in bfloat16, while norms, RoPE and
fusion compute in float32 and round once, which is what the serving kernels do.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from dflare.checkpoint import DraftConfig
from dflare.training.drafter.rope import Rotary, rotate

Architecture = Literal["dflare", "dflash"]
Mask = Tensor | BlockMask | None
KV = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32.

    Args:
        size: Length of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Grouped-query attention with a block mask.

    Args:
        query: ``[N, HQ, Q, hd]``.
        key: ``[N, KV, L, hd]``.
        value: ``[N, KV, L, hd]``.
        mask: Bool ``[N or 1, 1, Q, L]``, a flex-attention mask, or none to see every key.

    Returns:
        ``[N, HQ, Q, hd]``.
    """
    if isinstance(mask, BlockMask):
        attended = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
        assert isinstance(attended, Tensor)
        return attended
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )


class DraftAttention(nn.Module):
    """Attention of a draft layer: queries from the block, keys from context and block.

    Args:
        config: The drafter's configuration.
        separate_context: Project the context with weights of its own (DFlare).
    """

    def __init__(self, config: DraftConfig, separate_context: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, q, bias)
        self.k_proj = nn.Linear(hidden, kv, bias)
        self.v_proj = nn.Linear(hidden, kv, bias)
        self.o_proj = nn.Linear(q, hidden, bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        if separate_context:
            self.k_proj_target = nn.Linear(hidden, kv, bias)
            self.v_proj_target = nn.Linear(hidden, kv, bias)
        self.separate_context = separate_context

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def context_kv(self, fused: Tensor, rotary: KV) -> KV:
        """Project fused states ``[N, S, H]`` to K and V ``[N, KV, S, hd]``."""
        k_proj = self.k_proj_target if self.separate_context else self.k_proj
        v_proj = self.v_proj_target if self.separate_context else self.v_proj
        key = rotate(self.k_norm(self._heads(k_proj(fused))), rotary)
        return key, self._heads(v_proj(fused))

    def forward(self, x: Tensor, rotary: KV, context: KV, mask: Mask) -> Tensor:
        query = rotate(self.q_norm(self._heads(self.q_proj(x))), rotary)
        key = rotate(self.k_norm(self._heads(self.k_proj(x))), rotary)
        value = self._heads(self.v_proj(x))
        key = torch.cat([context[0], key], dim=2)
        value = torch.cat([context[1], value], dim=2)
        attended = attend(query, key, value, mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class DraftMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """One pre-norm transformer layer over the block."""

    def __init__(self, config: DraftConfig, separate_context: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DraftAttention(config, separate_context)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DraftMLP(config)

    def forward(self, x: Tensor, rotary: KV, context: KV, mask: Mask) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, context, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Drafter(nn.Module):
    """A block-diffusion drafter without embedding and head: those are the target's.

    Args:
        config: Sizes; D layers, T taps, block size B.
        architecture: ``dflare`` or ``dflash``.
        shared_kv: DFlare without context projections of its own.
        checkpoint_activations: Recompute each layer in the backward pass.
    """

    def __init__(
        self,
        config: DraftConfig,
        architecture: Architecture = "dflare",
        shared_kv: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.architecture = architecture
        self.checkpoint_activations = checkpoint_activations
        self.windows = [config.window(d) for d in range(config.num_hidden_layers)]
        separate = architecture == "dflare" and not shared_kv
        self.layers = nn.ModuleList(
            DraftLayer(config, separate) for _ in range(config.num_hidden_layers)
        )
        if architecture == "dflash":
            width = config.num_taps * config.hidden_size
            self.fc = nn.Linear(width, config.hidden_size, bias=False)
        else:
            self.layer_fusion_weights = nn.Parameter(initial_fusion_logits(config))
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)
        # [V'] int64, the tokens that are drafted; none for all.
        self.draft_ids: Tensor | None = None

    def logits(self, states: Tensor, head: Tensor) -> Tensor:
        """Logits of final hidden states.

        Args:
            states: ``[..., H]``.
            head: ``[V, H]``, the target's.

        Returns:
            ``[..., V]``, minus infinity for tokens that are not drafted.
        """
        logits = states @ head.T.to(states.dtype)
        if self.draft_ids is None:
            return logits
        ids = self.draft_ids.to(logits.device)
        return torch.full_like(logits, -torch.inf).index_copy_(-1, ids, logits[..., ids])

    def layer(self, d: int) -> DraftLayer:
        """Draft layer d."""
        layer = self.layers[d]
        assert isinstance(layer, DraftLayer)
        return layer

    def _fuse(self, taps: Tensor, layer: int) -> Tensor:
        """Context state of one layer, ``[N, S, H]`` (arXiv 2606.02091, section 3; DFlash's fc)."""
        if self.architecture == "dflash":
            return self.hidden_norm(self.fc(taps))
        share = self.layer_fusion_weights[layer].float().softmax(-1)
        # T passes over [N, S, H] instead of one einsum: no float32 copy of all taps.
        states = taps.unflatten(-1, (self.layer_fusion_weights.shape[1], -1)).unbind(-2)
        fused = sum(
            (p * state.float() for p, state in zip(share[1:], states[1:], strict=True)),
            share[0] * states[0].float(),
        )
        return self.hidden_norm(fused).to(taps.dtype)

    def context_kv(self, taps: Tensor, positions: Tensor) -> list[KV]:
        """Turn tapped states into the context K/V of all layers.

        Args:
            taps: ``[N, S, T*H]``, outputs of the tapped target layers side by side.
            positions: ``[N or 1, S]`` int64.

        Returns:
            For each layer K and V ``[N, KV, S, hd]``.
        """
        rotary = self.rotary(positions)
        shared = self._fuse(taps, 0) if self.architecture == "dflash" else None
        return [
            self.layer(d).self_attn.context_kv(
                self._fuse(taps, d) if shared is None else shared, rotary
            )
            for d in range(len(self.layers))
        ]

    def draft(
        self, embeddings: Tensor, positions: Tensor, context: list[KV], masks: dict[int, Mask]
    ) -> Tensor:
        """Run blocks over context K/V that is there already, as the engine does.

        Args:
            embeddings: ``[N, Q, H]``, the target's embeddings of anchor and mask tokens.
            positions: ``[N, Q]`` int64.
            context: From :meth:`context_kv`.
            masks: Visibility for each of ``windows`` (-1: full attention).

        Returns:
            Final hidden states ``[N, Q, H]``, ready for the target's head.
        """
        rotary = self.rotary(positions)
        x = embeddings
        for d in range(len(self.layers)):
            x = self.layer(d)(x, rotary, context[d], masks[self.windows[d]])
        return self.norm(x)

    def forward(
        self, taps: Tensor, embeddings: Tensor, positions: Tensor, masks: dict[int, Mask]
    ) -> Tensor:
        """Context and blocks in one go, for training; arguments as above, context from 0 to S-1."""
        context_positions = torch.arange(taps.shape[1], device=taps.device)[None]
        rotary, context_rotary = self.rotary(positions), self.rotary(context_positions)
        shared = self._fuse(taps, 0) if self.architecture == "dflash" else None

        def run_layer(d: int, x: Tensor) -> Tensor:
            layer = self.layer(d)
            fused = self._fuse(taps, d) if shared is None else shared
            context = layer.self_attn.context_kv(fused, context_rotary)
            return layer(x, rotary, context, masks[self.windows[d]])

        x = embeddings
        for d in range(len(self.layers)):
            if self.checkpoint_activations and self.training:
                x = checkpoint(run_layer, d, x, use_reentrant=False)
            else:
                x = run_layer(d, x)
        return self.norm(x)


def initial_fusion_logits(config: DraftConfig) -> Tensor:
    """Start layer d at tap floor(d / D * T): logit 2 there, 0 elsewhere, as published drafters."""
    layers, taps = config.num_hidden_layers, config.num_taps
    logits = torch.zeros(layers, taps)
    for d in range(layers):
        logits[d, d * taps // layers] = 2.0
    return logits
