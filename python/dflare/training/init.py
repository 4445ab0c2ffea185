"""Build a drafter for a target, and start it from the target's own layers.

A layer copied from near the target's head already turns its residual stream into the next token;
training then only has to teach it to look ahead from context K/V and mask tokens.
"""

import torch
from torch import Tensor

from dflare.checkpoint import DraftConfig, make_config, spread_taps
from dflare.training.config import DrafterSection
from dflare.training.errors import ConfigError
from dflare.training.model import Drafter
from dflare.training.target import Target

_NORM_START = 2.0  # of q_norm and k_norm where the target has none: keeps attention peaked


def tap_ids(section: DrafterSection, num_target_layers: int) -> tuple[int, ...]:
    """Return the tapped layers, spread over the target's depth if only their number is given."""
    if isinstance(section.taps, int):
        return spread_taps(num_target_layers, section.taps)
    return section.taps


def draft_config(section: DrafterSection, target: Target) -> DraftConfig:
    """Describe the drafter: what the section says, and the target's sizes for the rest.

    Raises:
        CheckpointError: Settings that contradict each other or the target.
        ConfigError: A mask token that the target does not have.
    """
    config = target.config
    if section.mask_token_id >= config.vocab_size:
        raise ConfigError(
            f"drafter.mask_token_id is {section.mask_token_id}, but the target's vocabulary ends "
            f"at {config.vocab_size - 1}; choose a token that text never holds, such as a reserved "
            "one"
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    window = section.sliding_window
    kind = "full_attention" if window is None else "sliding_attention"
    head_dim = getattr(config, "head_dim", None)
    values = {
        "hidden_size": config.hidden_size,
        "intermediate_size": section.intermediate_size or config.intermediate_size,
        "num_hidden_layers": section.layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim or config.hidden_size // config.num_attention_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope": {
            "theta": float(rope.pop("rope_theta", 10000.0)),
            "type": rope.pop("rope_type", "default"),
            "partial_rotary_factor": float(rope.pop("partial_rotary_factor", None) or 1.0),
            "parameters": rope,
        },
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "block_size": section.block_size,
        "mask_token_id": section.mask_token_id,
        "target_layer_ids": tap_ids(section, config.num_hidden_layers),
        "num_target_layers": config.num_hidden_layers,
        "layer_types": (kind,) * section.layers,
        "sliding_window": window,
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "dtype": section.dtype,
    }
    return make_config(values, "drafter")


def build_drafter(
    section: DrafterSection, target: Target, seed: int, checkpoint_activations: bool = False
) -> Drafter:
    """Make a drafter on the CPU in float32, started as the section says."""
    config = draft_config(section, target)
    # The numbers drawn must not depend on what else ran before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = Drafter(config, section.architecture, section.shared_kv, checkpoint_activations)
        std = getattr(target.config, "initializer_range", 0.02)
        for name, parameter in drafter.named_parameters():
            if name.endswith("proj.weight") or "_target.weight" in name or name == "fc.weight":
                torch.nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
    if section.init == "target":
        last = config.num_target_layers
        layers = section.init_layers or tuple(range(last - section.layers, last))
        copy_target_layers(drafter, target, layers)
    return drafter


def _strongest(gate: Tensor, up: Tensor, down: Tensor, count: int) -> Tensor:
    """Choose the feed-forward neurons to keep: those with the largest weights in and out."""
    strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    return strength.topk(count).indices.sort().values


@torch.no_grad()
def copy_target_layers(drafter: Drafter, target: Target, layers: tuple[int, ...]) -> None:
    """Start draft layer d from target layer ``layers[d]``.

    The context is normed with one weight for all layers (``hidden_norm``), the target's layers
    have one each, so that weight is folded into the context projections and ``hidden_norm`` is 1.

    Args:
        drafter: Overwritten.
        target: Has layers of the Llama and Qwen kind: q, k, v, o, gate, up, down.
        layers: Target layer for each draft layer.

    Raises:
        ConfigError: Layers that are not there or of another kind.
    """
    source = target.decoder.layers
    if not 0 <= min(layers) <= max(layers) < len(source):
        raise ConfigError(
            f"drafter.init_layers is {list(layers)}, but the target has layers 0 to "
            f"{len(source) - 1}; choose layers within them"
        )
    for d, layer_id in enumerate(layers):
        old = {name: p.detach().float().cpu() for name, p in source[layer_id].named_parameters()}
        new = drafter.layer(d)
        try:
            norm = old["input_layernorm.weight"]
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                new.get_parameter(name).copy_(old[name])
            for name, parameter in new.self_attn.named_parameters():
                if name in ("q_norm.weight", "k_norm.weight"):
                    start = old.get(f"self_attn.{name}")
                    parameter.fill_(_NORM_START) if start is None else parameter.copy_(start)
                    continue
                start = old[f"self_attn.{name.replace('_target', '')}"]
                folded = start * norm if "_target.weight" in name else start
                parameter.copy_(folded)
            mlp = [old[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
            if drafter.config.intermediate_size > len(mlp[0]):
                raise ConfigError(
                    f"drafter.intermediate_size is {drafter.config.intermediate_size}, the "
                    f"target's {len(mlp[0])} cannot fill it; set drafter.init=random or a smaller "
                    "size"
                )
            keep = _strongest(mlp[0], mlp[1], mlp[2], drafter.config.intermediate_size)
            new.mlp.gate_proj.weight.copy_(mlp[0][keep])
            new.mlp.up_proj.weight.copy_(mlp[1][keep])
            new.mlp.down_proj.weight.copy_(mlp[2][:, keep])
        except (KeyError, RuntimeError) as error:
            raise ConfigError(
                f"layer {layer_id} of the target is not of the Llama or Qwen kind ({error}); "
                "set drafter.init=random"
            ) from error
    drafter.norm.weight.copy_(target.decoder.norm.weight.float().cpu())
