"""A drafter's configuration, the same for every dialect that config.json is written in."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dflare.checkpoint.dialects import Dialect
from dflare.checkpoint.problems import raise_problems

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 2, 32

Dtype = Literal["bfloat16", "float16", "float32"]
LayerType = Literal["full_attention", "sliding_attention"]
RopeType = Literal["default", "linear", "yarn", "llama3"]

_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
_ELEMENT_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


class Rope(BaseModel):
    """Rotary position embedding (neox style), whichever transformers version wrote it."""

    model_config = _FROZEN

    theta: float = Field(gt=0, description="a number above 0")
    type: RopeType = Field(
        "default", description="default, linear, yarn or llama3 (others depend on the length)"
    )
    partial_rotary_factor: float = Field(
        1.0, gt=0, le=1, description="a number above 0 and at most 1"
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="an object with the scaling's own keys, such as factor"
    )

    @property
    def scaling(self) -> dict[str, Any] | None:
        """The value of `rope_scaling` in config.json: none for the default type."""
        return None if self.type == "default" else {"rope_type": self.type, **self.parameters}


class DraftConfig(BaseModel):
    """What a DFlare drafter is; the descriptions are what error messages expect.

    D = `num_hidden_layers`, T = `num_taps`, B = `block_size`. A tap is the output of a target
    layer, Hugging Face `hidden_states[id + 1]`.
    """

    model_config = _FROZEN

    hidden_size: int = Field(gt=0, description="a positive integer (the target's hidden size)")
    intermediate_size: int = Field(gt=0, description="a positive integer")
    num_hidden_layers: int = Field(gt=0, description="a positive integer (D, the draft layers)")
    num_attention_heads: int = Field(gt=0, description="a positive integer")
    num_key_value_heads: int = Field(gt=0, description="a positive integer")
    head_dim: int = Field(gt=0, multiple_of=2, description="a positive even integer")
    rms_norm_eps: float = Field(gt=0, lt=1, description="a number between 0 and 1")
    rope: Rope
    max_position_embeddings: int = Field(gt=0, description="a positive integer")
    vocab_size: int = Field(gt=0, description="a positive integer (the target's vocabulary)")
    draft_vocab_size: int | None = Field(
        None,
        gt=0,
        description="a positive integer (tokens that may be drafted) or null for the vocabulary",
    )
    block_size: int = Field(
        ge=MIN_BLOCK_SIZE,
        le=MAX_BLOCK_SIZE,
        description=f"an integer from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE} (tokens in a block)",
    )
    mask_token_id: int = Field(ge=0, description="a token id, 0 or more")
    target_layer_ids: tuple[int, ...] = Field(
        min_length=1, description="a non-empty list of target layer ids (the taps)"
    )
    num_target_layers: int = Field(gt=0, description="a positive integer (the target's layers)")
    layer_types: tuple[LayerType, ...] = Field(
        description="one of full_attention and sliding_attention for each draft layer"
    )
    sliding_window: int | None = Field(
        None, gt=0, description="a positive integer (tokens seen, the query's own included) or null"
    )
    attention_bias: bool = Field(False, description="true or false")
    hidden_act: Literal["silu"] = Field("silu", description="silu, the only activation supported")
    dtype: Dtype = Field("bfloat16", description="bfloat16, float16 or float32")
    dialect: Dialect = Field("angelslim", description="angelslim, angelspec or vllm")

    @property
    def num_taps(self) -> int:
        """T, the number of tapped target layers."""
        return len(self.target_layer_ids)

    @property
    def element_size(self) -> int:
        """Bytes of one weight."""
        return _ELEMENT_SIZE[self.dtype]

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that RoPE turns; the rest pass through."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    def window(self, layer: int) -> int:
        """Return how far back layer `layer` sees: the `window` of the attention ops.

        Returns:
            W - 1 for a sliding layer, where W = `sliding_window` counts the query itself as Hugging
            Face does; -1 for a full layer.
        """
        if self.layer_types[layer] == "full_attention":
            return -1
        assert self.sliding_window is not None
        return self.sliding_window - 1

    def sliding_note(self) -> str | None:
        """Return what to know about sliding layers before serving them, None where none slides.

        AngelSlim's training ignores the window with eager, sdpa and flex attention; with
        FlashAttention 2 it is symmetric (angelslim's DFlare draft model, read, not run).
        """
        sliding = self.layer_types.count("sliding_attention")
        if not sliding:
            return None
        return (
            f"{sliding} of {self.num_hidden_layers} layers slide: served, they see "
            f"{self.sliding_window} tokens and are causal inside the block, as in SGLang; one that "
            "AngelSlim trained with eager, sdpa or flex attention saw everything: if yours did, "
            "write full_attention for each of layer_types in its config.json"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return config.json in the AngelSlim dialect, whichever it was read from.

        The keys are those of AngelSlim's configs/qwen3_dflare.json that transformers 4 and 5 and
        SGLang all read.
        """
        sliding = "sliding_attention" in self.layer_types
        content: dict[str, Any] = {
            "architectures": ["QwenDFlareDraftModel"],
            "model_type": "qwen3",
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "block_size": self.block_size,
            "dflash_config": {
                "mask_token_id": self.mask_token_id,
                "target_layer_ids": list(self.target_layer_ids),
            },
            "head_dim": self.head_dim,
            "hidden_act": self.hidden_act,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layer_types": list(self.layer_types),
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_target_layers": self.num_target_layers,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": self.rope.scaling,
            "rope_theta": self.rope.theta,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": False,
            "torch_dtype": self.dtype,
            "use_cache": True,
            "use_sliding_window": sliding,
            "vocab_size": self.vocab_size,
        }
        if self.draft_vocab_size is not None:
            content["draft_vocab_size"] = self.draft_vocab_size
        if self.rope.partial_rotary_factor != 1.0:
            content["partial_rotary_factor"] = self.rope.partial_rotary_factor
        return content


def make_config(
    values: dict[str, Any], source: str | Path, key_names: dict[str, str] | None = None
) -> DraftConfig:
    """Build a configuration and refuse every value that makes no sense, all in one message.

    Args:
        values: Fields of DraftConfig; `rope` may be a dict.
        source: Where the values come from, for the message: a file, a command line.
        key_names: What the source calls a field, where it is not the field's own name.

    Raises:
        CheckpointError: Names each key, the value given, what is expected and what to do.
    """
    names = key_names or {}
    try:
        config = DraftConfig(**values)
    except ValidationError as error:
        raise_problems(source, [_sentence(dict(item), names) for item in error.errors()])
        raise AssertionError("pydantic reported an error without details") from error
    raise_problems(source, _contradictions(config, names))
    return config


def _sentence(error: dict[str, Any], names: dict[str, str]) -> str:
    """Turn one of pydantic's errors into: key, value given, what is expected, what to do."""
    path = [str(part) for part in error["loc"]]
    fields: dict[str, Any] = dict(DraftConfig.model_fields)
    if path[0] == "rope" and len(path) > 1:
        fields = dict(Rope.model_fields)
        path = path[1:]
    key = names.get(path[0], path[0])
    if error["type"] == "extra_forbidden":
        return f"`{key}` is not a setting of a DFlare drafter; remove it"
    expected = fields[path[0]].description or "an object"
    if error["type"] == "missing":
        return f"`{key}` is missing, expected {expected}; add it as the drafter was trained"
    at = "".join(f"[{part}]" for part in path[1:])
    return (
        f"`{key}{at}` is {error['input']!r}, expected {expected}; "
        "write the value that the drafter was trained with"
    )


def _contradictions(config: DraftConfig, names: dict[str, str]) -> list[str]:
    """Check what no field can tell alone."""

    def named(field: str) -> str:
        return f"`{names.get(field, field)}`"

    taps, layers = config.target_layer_ids, config.num_target_layers
    problems = []
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append(
            f"{named('num_attention_heads')} is {config.num_attention_heads}, expected a multiple "
            f"of {named('num_key_value_heads')} = {config.num_key_value_heads}; correct either"
        )
    if list(taps) != sorted(set(taps)):
        problems.append(
            f"{named('target_layer_ids')} is {list(taps)}, expected ids that increase: taps are "
            "taken in the target's order; sort them, and the columns of layer_fusion_weights too"
        )
    # Hugging Face gives the last layer's output after the final norm, SGLang not at all.
    if min(taps) < 0 or max(taps) >= layers - 1:
        problems.append(
            f"{named('target_layer_ids')} is {list(taps)}, expected ids from 0 to {layers - 2}, as "
            f"{named('num_target_layers')} is {layers} and the last layer cannot be tapped; "
            "correct either"
        )
    if config.mask_token_id >= config.vocab_size:
        problems.append(
            f"{named('mask_token_id')} is {config.mask_token_id}, expected an id below "
            f"{named('vocab_size')} = {config.vocab_size}; correct either"
        )
    if (config.draft_vocab_size or 0) > config.vocab_size:
        problems.append(
            f"{named('draft_vocab_size')} is {config.draft_vocab_size}, expected at most "
            f"{named('vocab_size')} = {config.vocab_size}; correct either"
        )
    if len(config.layer_types) != config.num_hidden_layers:
        problems.append(
            f"{named('layer_types')} has {len(config.layer_types)} entries, expected "
            f"{named('num_hidden_layers')} = {config.num_hidden_layers}; correct either"
        )
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        problems.append(
            f"{named('sliding_window')} is null, expected a positive integer, as "
            f"{named('layer_types')} has sliding_attention; add the window trained with"
        )
    if config.rotary_dim % 2 or config.rotary_dim == 0:
        problems.append(
            f"`partial_rotary_factor` is {config.rope.partial_rotary_factor}, expected one that "
            f"turns an even number of the {config.head_dim} dimensions of a head; correct it"
        )
    return problems


def spread_taps(num_target_layers: int, num_taps: int) -> tuple[int, ...]:
    """Spread taps evenly over the target's depth.

    The rule that AngelSlim's drafters default to (`build_target_layer_ids` in
    angelslim/compressor/speculative/train/models/draft/qwen_dflare.py): from layer 1 to the third
    last, the middle layer for a single tap.

    Raises:
        CheckpointError: The target has too few layers for that many different taps.
    """
    if num_taps == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    taps = tuple(round(1 + i * span / (num_taps - 1)) for i in range(num_taps))
    if span < 0 or len(set(taps)) < num_taps:
        raise_problems(
            f"a target of {num_target_layers} layers",
            [f"{num_taps} taps do not fit between layer 1 and the third last; choose fewer taps"],
        )
    return taps
