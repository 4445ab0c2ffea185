"""A tiny target, a tiny drafter and runs of a few seconds."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dflare.checkpoint import DraftConfig, make_config
from dflare.training.data.files import Record, write_records
from dflare.training.data.target import Target
from dflare.training.drafter.model import Drafter
from dflare.training.run.config import TrainConfig, parse_config


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


def tiny_target() -> Target:
    return Target(tiny_causal_lm(), (0, 1, 2))


def write_data(path: Path, sequences: int, seed: int = 0, vocab_size: int = 64) -> Path:
    """Random prompts of 4 tokens and answers of 8 to 24, without the mask token 3."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(sequences):
        length = int(rng.integers(12, 29))
        records.append(Record(rng.integers(4, vocab_size, size=length), [(4, length)]))
    write_records(path, {"target": "tiny", "vocab_size": vocab_size}, records)
    return path


def train_config(folder: Path, **changes) -> TrainConfig:
    """A run of a few seconds; keyword ``section__key`` changes a setting."""
    content: dict = {
        "target": {"name": "tiny"},
        "drafter": {
            "layers": 2,
            "taps": [0, 1, 2],
            "block_size": 4,
            "mask_token_id": 3,
            "intermediate_size": 48,
            "dtype": "float32",
        },
        "data": {
            "files": [str(folder / "data.xz")],
            "max_length": 64,
            "batch_size": 4,
            "anchors": 5,
            "held_out": 4,
        },
        "optimizer": {"learning_rate": 1e-3},
        "run": {
            "output": str(folder / "run"),
            "steps": 6,
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "log_every": 2,
        },
    }
    for key, value in changes.items():
        section, name = key.split("__")
        content.setdefault(section, {})[name] = value
    return parse_config(content, "test")
