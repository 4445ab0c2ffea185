"""What a drafter and its target cost in memory."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from dflare.checkpoint.config import DraftConfig
from dflare.checkpoint.tensors import DRAFT_TO_TARGET, expected_tensors


@dataclass(frozen=True)
class DraftSizes:
    """Sizes of a drafter.

    Attributes:
        parameters: Number of weights; embedding and head are the target's and do not count.
        weight_bytes: Bytes of the weights.
        kv_bytes_per_token: Bytes of context K/V that a token takes over all draft layers.
    """

    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int

    def to_dict(self) -> dict[str, int]:
        """Return the sizes by name."""
        return asdict(self)


def draft_sizes(config: DraftConfig) -> DraftSizes:
    """Compute a drafter's sizes; its K/V has the dtype of its weights."""
    shapes = expected_tensors(config)
    shapes.pop(DRAFT_TO_TARGET, None)
    parameters = sum(map(math.prod, shapes.values()))
    kv_elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return DraftSizes(
        parameters=parameters,
        weight_bytes=parameters * config.element_size,
        kv_bytes_per_token=kv_elements * config.element_size,
    )


def target_kv_bytes_per_token(target: Any) -> int | None:
    """Return the bytes of K/V that a token takes over all attention layers of a target.

    Args:
        target: Its transformers configuration; K/V has the dtype that it names, else two bytes.

    Returns:
        Bytes, or none for a target whose cache holds something else than heads of K and V (latent
        attention).
    """
    config = target.get_text_config()
    element_size = getattr(config.dtype, "itemsize", 2)
    if getattr(config, "kv_lora_rank", None):
        return None
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum(str(layer_type).endswith("_attention") for layer_type in types)
    layers -= sum(layer_type == "linear_attention" for layer_type in types)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // config.num_attention_heads
    return 2 * layers * heads * head_dim * element_size
