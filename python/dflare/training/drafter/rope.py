"""Rotary position embedding of the drafter (neox style), with transformers' frequency scalings."""

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dflare.checkpoint import DraftConfig


class Rotary(nn.Module):
    """Cosines and sines of positions, in float32.

    Args:
        config: Gives theta, the scaling and how much of a head turns.
    """

    frequencies: Tensor

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        rope = config.rope
        frequencies = rope.theta ** -(
            torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
        )
        self.scale = 1.0
        if rope.type != "default":
            described = Qwen3Config(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters={
                    "rope_theta": rope.theta,
                    "partial_rotary_factor": rope.partial_rotary_factor,
                    **(rope.scaling or {}),
                },
            )
            frequencies, self.scale = ROPE_INIT_FUNCTIONS[rope.type](described, "cpu")
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin ``[N, 1, S, rotary/2]`` float32 of positions ``[N, S]``."""
        assert self.frequencies.dtype == torch.float32, "run under autocast, do not cast the model"
        with torch.autocast(positions.device.type, enabled=False):
            angles = positions[:, None, :, None].float() * self.frequencies
            return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the leading dimensions of heads ``[N, heads, S, hd]``; the rest passes through."""
    cos, sin = rotary
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)
