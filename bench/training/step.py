"""Tokens per second, memory and the share of each part of a training step.

    python bench/training/step.py configs/demo/cpu-train.yaml --steps 10
    python bench/training/step.py configs/demo/gpu-train.yaml --steps 50 --json out.json

Measures the trainer itself on random text of full length, after warm-up steps that are not counted.
Shares are of the wall time of a second series of steps, by the marks in dflare.training: batch,
target, draft, loss, backward, optimizer.
"""

import json
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer

import dflare.training.run.step as step_module
import dflare.training.run.trainer as trainer_module
from dflare.processor import device_name
from dflare.training.data.files import Record, write_records
from dflare.training.data.target import Target
from dflare.training.run.config import TrainConfig, load_config
from dflare.training.run.trainer import Trainer

PARTS = ("batch", "target", "draft", "loss", "backward", "optimizer")
_WARM_UP = 4  # one epoch of the random data, which fills a tap cache


def random_data(config: TrainConfig, vocab_size: int, file: Path) -> None:
    """Write sequences of full length: what a step costs does not depend on what they say."""
    rng = np.random.default_rng(0)
    length = config.data.max_length
    low = config.drafter.mask_token_id + 1
    records = [
        Record(rng.integers(low % vocab_size, vocab_size, size=length), [(length // 4, length)])
        for _ in range(_WARM_UP * config.data.batch_size)
    ]
    write_records(file, {"target": "random", "vocab_size": vocab_size}, records)


def synchronise(device: torch.device) -> None:
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(trainer: Trainer, steps: int) -> float:
    """Seconds a step."""
    synchronise(trainer.device)
    started = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    synchronise(trainer.device)
    return (time.perf_counter() - started) / steps


class PartTimes:
    """Times the marked parts of a step, as `record_function` marks them for a profiler.

    On a GPU it is time on the device's own clock, from what is queued before a part to its last
    kernel: an event at either end, so nothing waits for the host. A profiler would not do: it keeps
    a mark and the GPU's work under it as two events of one name, and leaves out what a backward
    pass launches from a thread of its own.

    Args:
        on_gpu: Whether the parts run on a GPU.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """Time a part; takes the place of `record_function`."""
        started = self._now()
        yield
        self._spans.append((name, started, self._now()))

    def seconds(self) -> dict[str, float]:
        """Sum by part; on a GPU it must be done with them."""
        totals = dict.fromkeys(PARTS, 0.0)
        for name, started, ended in self._spans:
            gpu = self._on_gpu
            totals[name] += started.elapsed_time(ended) / 1e3 if gpu else ended - started
        return totals


def shares(trainer: Trainer, steps: int) -> dict[str, float]:
    """Share of the wall time of a step that each part takes; `rest` is what no part covers."""
    times = PartTimes(trainer.device.type == "cuda")
    with ExitStack() as patches:
        for module in (trainer_module, step_module):
            patches.enter_context(mock.patch.object(module, "record_function", times.mark))
        wall = timed(trainer, steps) * steps
    parts = {part: seconds / wall for part, seconds in times.seconds().items()}
    return parts | {"rest": max(0.0, 1.0 - sum(parts.values()))}


def measure(config: TrainConfig, target: Target, steps: int) -> dict[str, Any]:
    """Time steps of a configuration, and their parts."""
    trainer = Trainer(config, target)
    trainer.drafter.train()
    timed(trainer, _WARM_UP)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    seconds = timed(trainer, steps)
    if trainer.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(trainer.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    data, block = config.data, config.drafter.block_size
    return {
        "seconds_per_step": round(seconds, 4),
        "context_tokens_per_second": round(data.batch_size * data.max_length / seconds, 1),
        "slots_per_second": round(data.batch_size * data.anchors * block / seconds, 1),
        "peak_gib": round(memory / 2**30, 3),
        "shares": {name: round(share, 3) for name, share in shares(trainer, steps).items()},
        "parameters": sum(p.numel() for p in trainer.drafter.parameters()),
        "hardware": device_name(cuda=trainer.device.type == "cuda"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(
    config: Annotated[Path, typer.Argument(help="Training configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    steps: Annotated[int, typer.Option(help="Steps to time, and again by part.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write it here.")] = None,
) -> None:
    """Measure and print."""
    parsed = load_config(config, overrides)
    target = Trainer.load_target(parsed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "random.xz"
        random_data(parsed, target.config.vocab_size, data)
        changes = [f"data.files=[{data}]", "data.held_out=0", f"run.output={folder}/run"]
        if parsed.data.tap_cache is not None:
            changes.append(f"data.tap_cache={folder}/taps")
        parsed = load_config(config, [*(overrides or []), *changes])
        result = measure(parsed, target, steps)
    print(json.dumps(result, indent=2))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
