"""A tiny target and drafter that train in seconds."""

import torch
from dflare.checkpoint import DraftConfig, make_config
from dflare.training.model import Drafter
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_draft_config(**changes) -> DraftConfig:
    values = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope": {"theta": 10000.0},
        "max_position_embeddings": 256,
        "vocab_size": 64,
        "block_size": 4,
        "mask_token_id": 3,
        "target_layer_ids": (0, 1, 2),
        "num_target_layers": 4,
        "layer_types": ("full_attention", "full_attention"),
        "dtype": "float32",
    }
    return make_config({**values, **changes}, "test")


def random_drafter(config: DraftConfig, **options) -> Drafter:
    """A drafter whose every parameter matters: norms and fusion logits are not at their start."""
    torch.manual_seed(0)
    drafter = Drafter(config, **options)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
    return drafter


def tiny_causal_lm(**changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()
