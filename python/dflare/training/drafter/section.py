"""What a drafter is: its section of a training configuration."""

from typing import Literal

from pydantic import Field

from dflare.training.section import Section


class DrafterSection(Section):
    """The model that is trained; whatever is not here is as in the target.

    Args:
        architecture: ``dflare`` or ``dflash``.
        shared_kv: DFlare without context projections of its own (an ablation).
        layers: D.
        taps: Ids of the tapped target layers, or how many to spread over its depth.
        block_size: B.
        mask_token_id: Token that stands for slots to be predicted; one that text never holds.
        intermediate_size: Width of the feed-forward; none for the target's.
        sliding_window: Tokens that every draft layer sees; none for all.
        init: Start from layers of the target (``target``), from random weights (``random``), or
            from a drafter: its folder or Hugging Face id, any dialect. The block may be another.
        init_layers: Target layers to start from; none for its last D.
        dtype: Of the exported weights.
    """

    architecture: Literal["dflare", "dflash"] = "dflare"
    shared_kv: bool = False
    layers: int = Field(gt=0)
    taps: int | tuple[int, ...]
    block_size: int = Field(ge=2, le=32)
    mask_token_id: int = Field(ge=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    sliding_window: int | None = Field(default=None, gt=0)
    init: str = "target"
    init_layers: tuple[int, ...] | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
