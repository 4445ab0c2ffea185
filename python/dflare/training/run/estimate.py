"""What a run will take, before it starts: memory by part, time from a measured matrix product."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dflare.checkpoint import DraftConfig
from dflare.training.drafter.model import Drafter
from dflare.training.errors import TrainingError
from dflare.training.run.config import TrainConfig

# Of the measured product rate: what a training step reaches, and the target; rough figures.
_EFFICIENCY, _TARGET_EFFICIENCY = 0.35, 0.9


@dataclass(frozen=True)
class Estimate:
    """A forecast for one rank.

    Args:
        memory: Bytes by part.
        seconds_per_step: A step's operations, at a share of the product rate that this device
            showed; without the target.
        target_seconds: The same of reading a step's target states, where no cache has them.
        snapshot_bytes: Size of a snapshot on disk: weights and the two moments, float32.
    """

    memory: dict[str, int]
    seconds_per_step: float
    target_seconds: float
    snapshot_bytes: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.memory.values())

    def seconds(self, steps: float, reading: float) -> float:
        """Of so many steps, the first `reading` of which read the target's states."""
        return steps * self.seconds_per_step + min(steps, reading) * self.target_seconds

    def steps_within(self, seconds: float, reading: float) -> float:
        """Steps that so many seconds are enough for."""
        first = seconds / (self.seconds_per_step + self.target_seconds)
        left = seconds - self.seconds(reading, reading)
        return first if first < reading else reading + left / self.seconds_per_step


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure FLOP/s of a square matrix product (a few milliseconds)."""
    size = 4096 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def estimate_run(
    config: TrainConfig,
    drafter: Drafter,
    target: nn.Module,
    mean_length: float,
    dtype: torch.dtype,
    device: torch.device,
    world: int,
) -> Estimate:
    """Forecast memory and time.

    Args:
        config: Of the run.
        drafter: Built, for its size.
        target: The frozen model.
        mean_length: Tokens of a training sequence.
        dtype: Of the drafter's products.
        device: Of this rank.
        world: Ranks.
    """
    draft: DraftConfig = drafter.config
    element = dtype.itemsize
    parameters = sum(p.numel() for p in drafter.parameters())
    target_parameters = sum(p.numel() for p in target.parameters())
    target_dtype = next(target.parameters()).dtype
    rows = max(1, config.data.batch_size // (world * config.run.accumulate))
    context = rows * min(mean_length, config.data.max_length)
    slots = rows * config.data.anchors * draft.block_size
    hidden, vocab = draft.hidden_size, draft.vocab_size
    loss_vocab = vocab
    if config.objective.frequent:
        loss_vocab = min(vocab, config.objective.frequent + config.objective.random)
    # Values kept for the backward pass: a slot's q, attention output, residual and norm copies and
    # the feed-forward's three; a context token's fused state and K/V.
    attention = draft.num_attention_heads * draft.head_dim
    kv = draft.num_key_value_heads * draft.head_dim
    per_slot = 2 * attention + 4 * kv + 6 * hidden + 3 * draft.intermediate_size
    per_token = 3 * hidden + 4 * kv
    kept = int(draft.num_hidden_layers * (slots * per_slot + context * per_token) * element)
    if config.run.checkpoint_activations:
        kept = kept // draft.num_hidden_layers + int(
            draft.num_hidden_layers * slots * hidden * element
        )
    shards = world if config.run.shard else 1
    chunk = min(config.objective.chunk_tokens, slots)
    memory = {
        "target weights": target_parameters * target_dtype.itemsize,
        "target activations": int(context * hidden * 8 * element),
        "drafter, gradients, Adam": parameters * 16 // shards,
        "half-precision copies": parameters * element if element < 4 else 0,
        "tapped states": int(context * draft.num_taps * hidden * element),
        "activations": kept,
        "logits of a chunk": chunk * loss_vocab * 4 * 4,
    }
    # Forward and backward pass; recomputing is another forward pass.
    passes = 8.0 if config.run.checkpoint_activations else 6.0
    of_slots, of_tokens = parameters_by_use(drafter)
    flops = passes * (slots * of_slots + context * of_tokens)
    products = 3 if config.objective.soft_labels else 2
    flops += 2.0 * products * slots * hidden * loss_vocab
    reading = 2.0 * context * target_parameters
    return Estimate(
        memory,
        config.run.accumulate * flops / (_EFFICIENCY * product_rate(device, dtype)),
        config.run.accumulate * reading / (_TARGET_EFFICIENCY * product_rate(device, target_dtype)),
        3 * 4 * parameters,
    )


def parameters_by_use(drafter: Drafter) -> tuple[int, int]:
    """Return how many parameters a slot of a block goes through, and how many a context token."""
    of_slots, of_tokens = 0, 0
    separate = drafter.layer(0).self_attn.separate_context
    for name, parameter in drafter.named_parameters():
        context_only = "_target." in name or name.startswith("fc.")
        shared = not separate and (".k_proj." in name or ".v_proj." in name)
        of_slots += 0 if context_only else parameter.numel()
        of_tokens += parameter.numel() if context_only or shared else 0
    return of_slots, of_tokens


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that the device has left, none where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            values = dict(line.split(":", 1) for line in lines)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def check_disk(folder: Path, snapshot_bytes: int, has_snapshot: bool) -> None:
    """Refuse to start a run whose snapshots would not fit on the disk.

    Args:
        folder: Output folder; it exists.
        snapshot_bytes: Of one snapshot.
        has_snapshot: One is there already. The next is written beside it before it takes its
            place; the export, which comes last, needs less.

    Raises:
        TrainingError: There is less room than that.
    """
    needed = snapshot_bytes * (1 if has_snapshot else 2)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TrainingError(
            f"run.output {folder}: snapshots and export need {needed / 2**30:.2f} GiB, "
            f"{free / 2**30:.2f} GiB are free there; make room, or name another folder"
        )


def describe(
    estimate: Estimate,
    steps: int,
    reading: int,
    free: int | None,
    max_minutes: float | None = None,
) -> str:
    """Put a forecast into words, with advice where memory is short.

    Args:
        estimate: Of the run.
        steps: Steps that are left.
        reading: How many of them read the target's states: all, or those that the cache lacks.
        free: Bytes of free memory, none where that is not known.
        max_minutes: Minutes that are left, none for no limit.
    """
    gib = 2.0**30
    parts = ", ".join(f"{name} {size / gib:.2f}" for name, size in estimate.memory.items())
    text = f"Estimate: {estimate.total / gib:.2f} GiB ({parts})"
    minutes = estimate.seconds(steps, reading) / 60
    text += f"; {estimate.seconds_per_step:.2f} s a step"
    if reading:
        text += (
            f" and {estimate.target_seconds:.2f} s for the target in {min(steps, reading)} of them"
        )
    text += f", {minutes:.0f} min for {steps} steps"
    if max_minutes is not None and max_minutes < minutes:
        within = estimate.steps_within(60 * max_minutes, reading)
        text += f", of which {max_minutes:.0f} min are allowed: about {within:.0f} steps"
    text += f"; {estimate.snapshot_bytes / gib:.2f} GiB a snapshot"
    if free is not None and estimate.total > free:
        text += (
            f"\nThat is more than the {free / gib:.1f} GiB that are free: lower data.batch_size or "
            "data.anchors, raise run.accumulate, set run.checkpoint_activations=true, or a smaller "
            "objective.chunk_tokens"
        )
    return text
