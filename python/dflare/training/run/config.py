"""What a training run is: one YAML file, with `key=value` overrides."""

import glob
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from dflare.text_file import read_text
from dflare.training.drafter.section import DrafterSection
from dflare.training.errors import ConfigError
from dflare.training.loss.objective import Objective
from dflare.training.section import Section


class TargetSection(Section):
    """The frozen model that drafts are for.

    Args:
        name: Folder, Hugging Face id, or ``demo``.
        attention: ``dflare_grouped``, or transformers' ``sdpa`` or ``eager`` for models with
            attention sinks, capped scores or sliding windows.
    """

    name: str
    attention: Literal["dflare_grouped", "sdpa", "eager"] = "dflare_grouped"


class DataSection(Section):
    """What is learned from.

    Args:
        files: Written by ``dflare synth``, or by a server with ``DFLARE_TRAFFIC``; patterns such
            as ``traffic/traffic-*.xz`` stand for the files that there are.
        max_length: Tokens of a sequence that are used.
        batch_size: Sequences a step, over all ranks and micro-batches.
        anchors: Blocks a sequence.
        held_out: Sequences set aside for validation and ``dflare evaluate``.
        tap_noise: Noise on the target's states in training, as a share of their size; against
            learning the data by heart.
        tap_cache: Folder that keeps the target's states, so that it runs over each sequence once;
            none runs it in every step.
        server: Address of an SGLang server with ``DFLARE_STATES`` that runs the target's layers
            for this run, which then loads only its embedding and head.
        states: The folder that the server's ``DFLARE_STATES`` names, as seen from here.
    """

    files: tuple[str, ...] = Field(min_length=1)
    max_length: int = Field(gt=2)
    batch_size: int = Field(gt=0)
    anchors: int = Field(gt=0)
    held_out: int = Field(default=64, ge=0)
    tap_noise: float = Field(default=0.0, ge=0)
    tap_cache: str | None = None
    server: str | None = None
    states: str | None = None

    @field_validator("files")
    @classmethod
    def _expand(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        """Replace patterns; a file that is named may still be to be written."""
        found = []
        for name in files:
            matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            if not matches:
                raise ValueError(f"{name!r} fits no file")
            found += matches
        return tuple(found)


class ObjectiveSection(Objective):
    """What is minimised, see :class:`dflare.training.loss.objective.Objective`, and at what cost.

    Args:
        frequent: Reduced loss vocabulary: this many of the most frequent tokens ...
        random: ... and this many others, drawn anew each step; with neither, all tokens count.
        chunk_tokens: Slots whose logits exist at once.
    """

    frequent: int = Field(default=0, ge=0)
    random: int = Field(default=0, ge=0)
    chunk_tokens: int = Field(default=2048, gt=0)


class OptimizerSection(Section):
    """AdamW with a cosine schedule.

    Args:
        learning_rate: At the end of the warm-up.
        final_share: Share of it that is left at the end.
        warmup: Share of the run that warms up: of its steps or of its time, as it ends by the one
            or the other; see :class:`dflare.training.run.clock.Clock`.
        betas: Of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Of matrices; norms and fusion logits do not decay.
        fusion_rate: Learning rate of the fusion logits over that of the rest; 0 freezes them.
        clip: Norm to which gradients are clipped.
    """

    learning_rate: float = Field(default=6e-4, gt=0)
    final_share: float = Field(default=0.0, ge=0, le=1)
    warmup: float = Field(default=0.04, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    fusion_rate: float = Field(default=20.0, ge=0)
    clip: float = Field(default=1.0, gt=0)


class RunSection(Section):
    """How long, where and how.

    Args:
        output: Folder of checkpoints, logs and the export.
        epochs: Passes over the data; ``steps`` overrides it.
        steps: Steps; none to go by ``epochs``.
        max_minutes: Training time, resumed runs added up; the schedule ends in time for it.
        seed: Of everything random.
        device: ``cpu``, ``cuda`` or ``auto``.
        dtype: What products are computed in; none for bfloat16 on CUDA and on processors that
            multiply it (AVX-512 BF16, AMX), else float32.
        compile: Compile the drafter and the loss; none to do so on CUDA.
        checkpoint_activations: Recompute activations in the backward pass.
        accumulate: Micro-batches a step on each rank.
        shard: Shard weights and optimizer over the ranks (FSDP2) instead of replicating (DDP).
        threads: CPU threads; none leaves PyTorch's choice.
        tracker: ``tensorboard`` in the output folder, if it is installed, or a run of ``wandb`` or
            ``trackio`` named like that folder, in the project ``dflare`` or what
            ``WANDB_PROJECT`` or ``TRACKIO_PROJECT`` names.
        log_every: Steps between log lines.
        validate_every: Steps between validations; none only at the end.
        save_minutes: Minutes between snapshots to resume from.
    """

    output: str
    epochs: int = Field(default=1, gt=0)
    steps: int | None = Field(default=None, gt=0)
    max_minutes: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["bfloat16", "float32"] | None = None
    compile: bool | None = None
    checkpoint_activations: bool = False
    accumulate: int = Field(default=1, gt=0)
    shard: bool = False
    threads: int | None = Field(default=None, gt=0)
    tracker: Literal["tensorboard", "wandb", "trackio"] = "tensorboard"
    log_every: int = Field(default=10, gt=0)
    validate_every: int | None = Field(default=None, gt=0)
    save_minutes: float = Field(default=10.0, gt=0)


class TrainConfig(Section):
    """A whole training run."""

    target: TargetSection
    drafter: DrafterSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        if self.drafter.shared_kv and self.drafter.architecture != "dflare":
            raise ValueError(
                "drafter.shared_kv belongs to architecture dflare; dflash always has it"
            )
        if self.drafter.init_layers and len(self.drafter.init_layers) != self.drafter.layers:
            raise ValueError(
                f"drafter.init_layers has {len(self.drafter.init_layers)} entries for "
                f"{self.drafter.layers} layers; give one target layer for each"
            )
        if (self.data.server is None) != (self.data.states is None):
            raise ValueError("data.server needs data.states, the folder of states; give both")
        if self.data.server is not None and self.drafter.init == "target":
            raise ValueError(
                "with data.server the target's layers are not here to start the drafter from; set "
                "drafter.init to a trained drafter's folder, or to random"
            )
        extends, block_size = self.objective.extends, self.drafter.block_size
        if extends is not None and (
            extends >= block_size or self.drafter.init in ("target", "random")
        ):
            raise ValueError(
                f"objective.extends is {extends} with drafter.block_size {block_size} and "
                f"drafter.init {self.drafter.init}; expected the block size of a trained drafter "
                "in drafter.init, and a larger drafter.block_size"
            )
        if self.objective.random and not self.objective.frequent:
            raise ValueError("objective.random adds to objective.frequent; give both or neither")
        return self


def _override(content: dict[str, Any], assignment: str) -> None:
    key, separator, value = assignment.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise ConfigError(f"{assignment!r} is not an override; write section.key=value")
    node = content
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{assignment!r}: {part} is a value, not a section")
    try:
        node[path[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{assignment!r}: the value is not YAML ({error})") from error


def parse_config(content: Any, source: str) -> TrainConfig:
    """Check a configuration.

    Args:
        content: Nested dict, as YAML gives it.
        source: Where it is from, for messages.

    Raises:
        ConfigError: Names every key that is wrong, with the value given and what is expected.
    """
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"] if part not in ("int", "tuple"))
            if problem["type"] == "extra_forbidden":
                text = f"{key} is not a setting; see docs/training.md for those there are"
            elif problem["type"] == "missing":
                text = f"{key} is missing; give it in the file or as {key}=..."
            elif problem["type"] == "value_error":
                text = str(problem["ctx"]["error"])
            else:
                text = f"{key} is {problem['input']!r}: {problem['msg'].lower()}"
            lines.append(f"\n  - {text}")
        raise ConfigError(f"{source}:{''.join(dict.fromkeys(lines))}") from error


def load_config(path: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a YAML file and apply `section.key=value` overrides.

    Raises:
        ConfigError: Unreadable, not YAML, or with settings that make no sense.
    """
    try:
        content = yaml.safe_load(read_text(path, ConfigError))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no settings; see configs/ for examples")
    for assignment in overrides or []:
        _override(content, assignment)
    return parse_config(content, str(path))
