"""Build a drafter for a target, and start it from the target's own layers.

A layer copied from near the target's head already turns its residual stream into the next token;
training then only has to teach it to look ahead from context K/V and mask tokens.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dflare.checkpoint import DraftConfig, make_config, spread_taps
from dflare.training.data.target import Target
from dflare.training.drafter.export import load_drafter
from dflare.training.drafter.model import Drafter, DraftLayer, RMSNorm
from dflare.training.drafter.section import DrafterSection
from dflare.training.errors import ConfigError

_NORM_START = 2.0  # of q_norm and k_norm where the target has none: keeps attention peaked
# What a drafter takes over from its target's configuration.
_SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "vocab_size",
    "num_hidden_layers",
)


def tap_ids(section: DrafterSection, num_target_layers: int) -> tuple[int, ...]:
    """Return the tapped layers, spread over the target's depth if only their number is given."""
    if isinstance(section.taps, int):
        return spread_taps(num_target_layers, section.taps)
    return section.taps


def draft_config(section: DrafterSection, target: Target) -> DraftConfig:
    """Describe the drafter: what the section says, and the target's sizes for the rest.

    Raises:
        CheckpointError: Settings that contradict each other or the target.
        ConfigError: A mask token that the target does not have, or a target whose configuration
            lacks a size that the drafter takes over.
    """
    config = target.config
    needed = _SIZES if section.intermediate_size else (*_SIZES, "intermediate_size")
    missing = [name for name in needed if getattr(config, name, None) is None]
    if missing:
        raise ConfigError(
            f"the target's configuration ({config.model_type}) has no {', '.join(missing)}, which "
            "the drafter takes over; choose a target of the Llama or Qwen kind"
        )
    if section.mask_token_id >= config.vocab_size:
        raise ConfigError(
            f"drafter.mask_token_id is {section.mask_token_id}, but the target's vocabulary ends "
            f"at {config.vocab_size - 1}; choose a token that text never holds, such as a reserved "
            "one"
        )
    window = section.sliding_window
    kind = "full_attention" if window is None else "sliding_attention"
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope = dict(rope.get(kind, rope))  # some targets have one for each type of layer
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
        copy_target_layers(drafter, target, init_layers(section, config))
    elif section.init != "random":
        copy_drafter(drafter, section.init)
    return drafter


def init_layers(section: DrafterSection, config: DraftConfig) -> tuple[int, ...]:
    """Return the target layer that each draft layer starts from."""
    last = config.num_target_layers
    return section.init_layers or tuple(range(last - section.layers, last))


def copy_drafter(drafter: Drafter, path: str) -> None:
    """Go on from a trained drafter, with a block of any size: no weight depends on it.

    Args:
        drafter: Overwritten; it has K/V projections for the context if ``path``'s drafter has.
        path: Folder or hub id, any dialect.

    Raises:
        CheckpointError: Not a drafter, or not a whole one.
        ConfigError: A drafter that computes something else, by the settings that differ.
    """
    start = load_drafter(path)
    wanted, given = (_computation(part) for part in (drafter, start))
    differing = [
        f"{name} is {value!r} and {given[name]!r} in the checkpoint"
        for name, value in wanted.items()
        if value != given[name]
    ]
    if differing:
        raise ConfigError(
            f"drafter.init {path}: {'; '.join(differing)}; set them as the checkpoint has them, or "
            "start from the target"
        )
    drafter.load_state_dict(start.state_dict())
    drafter.draft_ids = start.draft_ids
    drafted = {"draft_vocab_size": start.config.draft_vocab_size}
    drafter.config = drafter.config.model_copy(update=drafted)


def _computation(drafter: Drafter) -> dict[str, Any]:
    """What a drafter computes but for its weights, its block and the tokens that it drafts."""
    other = {"block_size", "draft_vocab_size", "dtype", "dialect"}
    fields = drafter.config.model_dump(exclude=other)
    shared_kv = not drafter.layer(0).self_attn.separate_context
    return fields | {"architecture": drafter.architecture, "shared_kv": shared_kv}


@torch.no_grad()
def tap_sizes(target: Target, sequences: Sequence[np.ndarray]) -> Tensor:
    """Measure the target's states.

    Args:
        target: Tapped.
        sequences: Token ids of some text.

    Returns:
        ``[T]`` float32, the median over tokens of the root mean square of each tapped state.
    """
    parts = []
    for ids in sequences:
        tokens = torch.from_numpy(ids).long().to(target.device)
        states = target.read(tokens[None]).taps.unflatten(-1, (len(target.taps), -1))
        parts.append(states[0].float().square().mean(-1).sqrt().cpu())
    return torch.cat(parts).median(0).values


@torch.no_grad()
def start_fusion(drafter: Drafter, layers: tuple[int, ...], sizes: Tensor) -> None:
    """Start the fusion from what each layer read in the target, whatever the sizes of the taps.

    States grow with depth: equal shares would leave early taps without a voice. So the logit is
    -log of the tap's size, and 2 more for the tap nearest to the input of the layer that the draft
    layer was copied from, which is the output of the layer before.

    Args:
        drafter: Overwritten.
        layers: Target layer for each draft layer.
        sizes: From :func:`tap_sizes`.
    """
    taps = torch.tensor(drafter.config.target_layer_ids)
    logits = -sizes.clamp(min=1e-6).log().repeat(len(layers), 1)
    for d, layer in enumerate(layers):
        logits[d, (taps - (layer - 1)).abs().argmin()] += 2.0
    drafter.layer_fusion_weights.copy_(logits - logits.mean(-1, keepdim=True))


def _strongest(gate: Tensor, up: Tensor, down: Tensor, count: int) -> Tensor:
    """Choose the feed-forward neurons to keep: those with the largest weights in and out."""
    strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    return strength.topk(count).indices.sort().values


def _check_norm(norm: nn.Module, name: str, eps: float) -> None:
    """Refuse a norm that is not the drafter's: one that adds 1 to its weight, or LayerNorm."""
    weight = norm.get_parameter("weight")
    own = RMSNorm(len(weight), eps)
    own.weight.copy_(weight)
    states = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    theirs = copy.deepcopy(norm).float().cpu()(states)
    if not torch.allclose(own(states), theirs, atol=1e-4, rtol=1e-4):
        raise ConfigError(
            f"the target's {name} ({type(norm).__name__}) is not the norm that a drafter has, an "
            "RMSNorm times its weight, so a copy would compute something else; set "
            "drafter.init=random"
        )


def _check_layer(layer: nn.Module, layer_id: int, eps: float) -> None:
    """Refuse a layer that computes something else from weights of the same names."""
    for name, module in layer.named_modules():
        if name.endswith("norm"):
            _check_norm(module, f"layers.{layer_id}.{name}", eps)
    values = torch.linspace(-4.0, 4.0, 17)
    activation = layer.get_submodule("mlp.act_fn")
    if not torch.allclose(nn.functional.silu(values), activation(values), atol=1e-4):
        raise ConfigError(
            f"the feed-forward of the target's layer {layer_id} has {type(activation).__name__} "
            "where a drafter has SiLU, so a copy would compute something else; set "
            "drafter.init=random"
        )


def _copy_layer(new: DraftLayer, source: nn.Module, width: int) -> None:
    """Overwrite a draft layer with a target's layer; of its feed-forward take ``width`` neurons."""
    old = {name: p.detach().float().cpu() for name, p in source.named_parameters()}
    norm = old["input_layernorm.weight"]
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        new.get_parameter(name).copy_(old[name])
    for name, parameter in new.self_attn.named_parameters():
        if name in ("q_norm.weight", "k_norm.weight"):
            start = old.get(f"self_attn.{name}")
            parameter.fill_(_NORM_START) if start is None else parameter.copy_(start)
            continue
        start = old[f"self_attn.{name.replace('_target', '')}"]
        parameter.copy_(start * norm if "_target.weight" in name else start)
    gate, up, down = (old[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    if width > len(gate):
        raise ConfigError(
            f"drafter.intermediate_size is {width}, the target's {len(gate)} cannot fill it; set "
            "drafter.init=random or a smaller size"
        )
    keep = _strongest(gate, up, down, width)
    new.mlp.gate_proj.weight.copy_(gate[keep])
    new.mlp.up_proj.weight.copy_(up[keep])
    new.mlp.down_proj.weight.copy_(down[:, keep])


@torch.no_grad()
def copy_target_layers(drafter: Drafter, target: Target, layers: tuple[int, ...]) -> None:
    """Start draft layer d from target layer ``layers[d]``.

    The context is normed with one weight for all layers (``hidden_norm``), the target's layers
    have one each: DFlare's context projections take theirs in, and ``hidden_norm`` is 1; where K/V
    are shared it is their mean.

    Args:
        drafter: Overwritten.
        target: Has layers of the Llama and Qwen kind: q, k, v, o, gate, up, down.
        layers: Target layer for each draft layer.

    Raises:
        ConfigError: Layers that are not there or of another kind, by their weights' names, norms
            or activation.
    """
    source = target.decoder.layers
    if not 0 <= min(layers) <= max(layers) < len(source):
        raise ConfigError(
            f"drafter.init_layers is {list(layers)}, but the target has layers 0 to "
            f"{len(source) - 1}; choose layers within them"
        )
    for d, layer_id in enumerate(layers):
        try:
            _check_layer(source[layer_id], layer_id, drafter.config.rms_norm_eps)
            _copy_layer(drafter.layer(d), source[layer_id], drafter.config.intermediate_size)
        except (AttributeError, KeyError, RuntimeError) as error:
            raise ConfigError(
                f"layer {layer_id} of the target is not of the Llama or Qwen kind ({error}); "
                "set drafter.init=random"
            ) from error
    final = target.decoder.norm
    _check_norm(final, "final norm", drafter.config.rms_norm_eps)
    drafter.norm.weight.copy_(final.weight.float().cpu())
    if not drafter.layer(0).self_attn.separate_context:
        # One projection serves context and block, so no norm can be folded into it.
        norms: list[torch.Tensor] = [
            drafter.layer(d).input_layernorm.weight for d in range(len(layers))
        ]
        drafter.hidden_norm.weight.copy_(torch.stack(norms).mean(0))
    if drafter.architecture == "dflash":
        taps, hidden = drafter.config.num_taps, drafter.config.hidden_size
        drafter.fc.weight.copy_(torch.eye(hidden).repeat(1, taps) / taps)  # the mean of the taps
