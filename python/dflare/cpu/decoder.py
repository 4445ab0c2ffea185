"""The layers of Llama- and Qwen-like targets as one operator, on the CPU platform.

A decode step of a small target takes ten to twenty milliseconds, and what SGLang's Python does
around three hundred operators of it is as long as their arithmetic.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel

from dflare import ops
from dflare.cpu.attention import CpuAttentionBackend
from dflare.cpu.layers import CpuLinearMethod, is_plain_norm
from dflare.cpu.memory import CpuKVPool

logger = logging.getLogger(__name__)

# Models of SGLang whose forward is embedding, layers, norm, and those layers; others, of EAGLE say,
# have the same names in other modules.
_MODELS = {
    "llama.LlamaModel": "llama.LlamaDecoderLayer",
    "qwen2.Qwen2Model": "qwen2.Qwen2DecoderLayer",
    "qwen3.Qwen3Model": "qwen3.Qwen3DecoderLayer",
}
_COLUMNS = 32  # that the operator's matrices have a multiple of


def use_decoder_layers(model: torch.nn.Module) -> None:
    """Let the body of `model` run as one operator wherever it is one that we know."""
    body: Any = getattr(model, "model", None)
    wanted = _MODELS.get(_name(body))
    if wanted is not None and all(_name(layer) == wanted for layer in body.layers):
        body.forward = DecoderForward(body, body.forward)


def _name(module: Any) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("sglang.srt.models.")


class DecoderForward:
    """A model's forward; SGLang's own where the operator does not do what it does."""

    def __init__(self, body: Any, stock: Callable[..., Any]) -> None:
        """
        Args:
            body: a `LlamaModel` or the like, with its weights.
            stock: its forward.
        """
        self._body, self._stock = body, stock
        self._known: tuple[ops.DecoderWeights, Any, Any] | None = None
        self._looked = False

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: Any = None,
    ) -> Any:
        """As the model's forward; the tapped states come packed, [rows, taps * hidden]."""
        if not self._looked:  # at the first batch: adapters have taken their layers by then
            self._looked, self._known = True, look_at(self._body)
            how = "layer by layer" if self._known is None else "as one operator"
            logger.info("DFLARE: the target's layers run %s", how)
        backend = get_attn_backend()
        pool = getattr(backend, "token_to_kv_pool", None)
        if (
            self._known is None
            or input_embeds is not None
            or not len(input_ids)
            or not isinstance(backend, CpuAttentionBackend)
            or not isinstance(pool, CpuKVPool)
            or pool.layer_transfer_counter is not None  # layers may have to wait for their keys
        ):
            return self._stock(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
        weights, attention, rotary = self._known
        taps = sorted(set(self._body.layers_to_capture))
        hidden, tapped = ops.decoder_layers(
            self._body.embed_tokens(input_ids),
            weights,
            rotary.cos_sin_cache,
            positions.long(),
            pool.k_buffer + pool.v_buffer,
            forward_batch.out_cache_loc.long(),
            backend.queries(attention, forward_batch),
            backend.query_start,
            window=attention.sliding_window_size,
            scale=attention.scaling,
            logit_cap=attention.logit_cap,
            parents=backend.parents,
            taps=taps,
        )
        return (hidden, tapped) if taps else hidden


def look_at(body: Any) -> tuple[ops.DecoderWeights, Any, Any] | None:
    """Weights, attention and rotary embedding of the layers; None if any is not as expected.

    Adapters, quantised weights, several ranks and hooks on a layer are not; weights are held as
    parameters: whatever is loaded into them later is seen.
    """
    layers = list(body.layers)
    attentions = [layer.self_attn for layer in layers]
    norms = [n for x in layers for n in (x.input_layernorm, x.post_attention_layernorm)]
    norms.append(body.norm)
    head_norms = [
        getattr(a, name) for a in attentions for name in ("q_norm", "k_norm") if hasattr(a, name)
    ]
    linears = [
        each
        for a, layer in zip(attentions, layers, strict=True)
        for each in (a.qkv_proj, a.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    ]
    dtype = body.norm.weight.dtype
    if not all(_is_plain_linear(each, dtype) for each in linears):
        return None  # with adapters, or quantised: they need not have what is read below
    biases = [a.qkv_proj.bias for a in attentions if a.qkv_proj.bias is not None]
    first, rotary = attentions[0].attn, attentions[0].rotary_emb
    fits = (
        get_parallel().tp_size == get_parallel().pp_size == 1
        and all(type(n) is RMSNorm and is_plain_norm(n, dtype) for n in norms + head_norms)
        and len({n.variance_epsilon for n in norms + head_norms}) == 1
        and len(head_norms) in (0, 2 * len(layers))
        and len(biases) in (0, len(layers))
        and not any(x.bias is not None for i, x in enumerate(linears) if i % 4)
        and all(a.rotary_emb is rotary for a in attentions)
        and _is_plain_rotary(rotary)
        and all(_same_attention(a.attn, first) for a in attentions)
        and [a.attn.layer_id for a in attentions] == list(range(len(layers)))
        and not hasattr(body.config, "scale_emb")
        and not any(
            m._forward_hooks or m._forward_pre_hooks for m in body.modules() if m is not body
        )
    )
    if not fits:
        return None
    weights = ops.DecoderWeights(
        [n.weight for n in norms],
        [each.weight for each in linears],
        biases,
        [n.weight for n in head_norms],
        body.norm.variance_epsilon,
    )
    return weights, first, rotary


def _is_plain_linear(linear: Any, dtype: torch.dtype) -> bool:
    """Whether a layer multiplies by a matrix that the operator takes, and does nothing else."""
    return (
        type(getattr(linear, "quant_method", None)) is CpuLinearMethod
        and linear.weight.dtype == dtype
        and linear.weight.is_contiguous()
        and linear.weight.shape[1] % _COLUMNS == 0
    )


def _is_plain_rotary(rotary: Any) -> bool:
    """Whether a rotary embedding turns heads by its table, whatever the table was made from."""
    return (
        isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward is RotaryEmbedding.forward
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and rotary.is_neox_style
        and rotary.cos_sin_cache.dtype == torch.float32
    )


def _same_attention(layer: Any, first: Any) -> bool:
    """Whether a layer attends as the first does: causally, with its heads, window and scale."""
    names = [
        *("tp_q_head_num", "tp_k_head_num", "tp_v_head_num", "qk_head_dim", "v_head_dim"),
        *("sliding_window_size", "scaling", "logit_cap"),
    ]
    return (
        all(getattr(layer, name) == getattr(first, name) for name in names)
        and layer.qk_head_dim == layer.v_head_dim
        and layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
    )
