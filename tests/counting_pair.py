"""A target and a drafter whose weights are made by hand, so that drafts depend on what is tapped.

The target counts: it has two rings of 64 tokens and goes round the one that the prompt's last token
is in, STEP tokens at a time. A token's embedding has its place on the ring twice: as a coarse code
of six frequencies, which the target's head goes by, and as one faint angle. A middle layer moves
all of it to other dimensions. The drafter reads the angle from the taps behind that layer, for the
token before the anchor, and turns it by the first ring's step; the target's head does the other
step. So nearly every draft is right, until the target, its precision, the prompt's end or the taps
are not those that the drafter was made for.
"""

import math
from pathlib import Path

import torch
from checkpoints import byte_tokenizer, random_draft_config, random_tensors, write_random_target
from safetensors.torch import load_file, save_file

from dflare.checkpoint import DraftConfig

_HIDDEN, _RING = 64, 64
_FREQUENCIES = (3, 7, 11, 19, 23, 29)
_FAINT = 0.05
_CODE = 2 * len(_FREQUENCIES)  # dimensions, before the two of the angle
STEPS = (1, 3)  # of the two rings
TAP = 1  # the layer whose output the drafter was made for
_LAYERS = 3


def rings() -> tuple[range, range]:
    """Token ids; the newline that ends the usual chat template is in the first ring."""
    tokenizer = byte_tokenizer()
    newline, colon = (tokenizer.encode(text)[0] for text in ("\n", ":"))
    return range(newline - 10, newline - 10 + _RING), range(colon - 25, colon - 25 + _RING)


def _place(ring: int, angle: bool) -> slice:
    """Dimensions of a ring's code, or of its angle; dimension 0 is the same for all tokens."""
    first = 1 + ring * (_CODE + 2)
    return slice(first + _CODE, first + _CODE + 2) if angle else slice(first, first + _CODE)


def _waves(frequencies: tuple[int, ...]) -> torch.Tensor:
    """Cosines and sines [_RING, 2 * frequencies] of all places on a ring."""
    turns = torch.arange(_RING)[:, None] * torch.tensor(frequencies) * 2 * math.pi / _RING
    return torch.cat([turns.cos(), turns.sin()], 1)


def _moved(x: torch.Tensor) -> torch.Tensor:
    """What the middle layer makes of [..., H]."""
    return x.roll(_HIDDEN // 2, -1)


def write_counting_target(
    folder: Path, steps: tuple[int, int] = STEPS, levels: int | None = None
) -> Path:
    """Write the target.

    Args:
        folder: Made if it is not there.
        steps: Of the two rings, in tokens.
        levels: Round every row of every matrix to so many steps each way; None keeps float32.
    """
    write_random_target(folder, num_layers=_LAYERS, hidden_size=_HIDDEN)
    file = folder / "model.safetensors"
    tensors = {name: torch.zeros_like(x) for name, x in load_file(file).items()}
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.fill_(1)
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    embedding[:, 0] = 1
    for ring, (ids, step) in enumerate(zip(rings(), steps, strict=True)):
        rows = torch.tensor(ids)
        code, angle = _waves(_FREQUENCIES), _waves((1,))
        embedding[rows, _place(ring, False)] = code
        embedding[rows, _place(ring, True)] = _FAINT * angle
        before = torch.zeros(_RING, _HIDDEN)  # the token that each one follows
        before[:, _place(ring, False)] = code.roll(step, 0)
        before[:, _place(ring, True)] = angle.roll(step, 0)
        head[rows] = _moved(before)
    # The gate is the same for all tokens, so that the layer is linear in what it normalises.
    scale = math.sqrt(_HIDDEN) / embedding[rings()[0][0]].norm()
    gate = torch.tensor(10.0)
    layer = f"model.layers.{TAP}.mlp."
    tensors[layer + "gate_proj.weight"][:, 0] = gate / scale
    tensors[layer + "up_proj.weight"][:_HIDDEN] = torch.eye(_HIDDEN)
    move = (_moved(torch.eye(_HIDDEN)) - torch.eye(_HIDDEN)).T
    tensors[layer + "down_proj.weight"][:, :_HIDDEN] = move / (
        scale * torch.nn.functional.silu(gate)
    )
    if levels:
        tensors = {name: _rounded(x, levels) for name, x in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _rounded(x: torch.Tensor, levels: int) -> torch.Tensor:
    if x.dim() < 2:
        return x
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-9) / levels
    return (x / step).round() * step


def counting_drafter(tap: int = TAP) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of the drafter that reads the output of target layer `tap`."""
    config = random_draft_config(
        hidden_size=_HIDDEN,
        num_layers=1,
        num_kv_heads=4,
        num_target_layers=_LAYERS,
        taps=(tap,),
        block_size=2,
        # The first draft then sees the anchor, itself, and one token of context.
        layer_types=("sliding_attention",),
        sliding_window=3,
    )
    tensors = {
        name: torch.ones_like(x) if "norm" in name else torch.zeros_like(x)
        for name, x in random_tensors(config).items()
    }
    angle = 2 * math.pi * STEPS[0] / _RING
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    weight = torch.zeros(_HIDDEN, _HIDDEN)
    for ring in (0, 1):
        place = _place(ring, True)
        weight[place, place] = turn
    attention = "layers.0.self_attn."
    tensors[attention + "v_proj_target.weight"] = weight.roll((_HIDDEN // 2, _HIDDEN // 2), (0, 1))
    tensors[attention + "o_proj.weight"] = 100 * torch.eye(_HIDDEN)
    return config, tensors
