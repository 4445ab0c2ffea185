"""The training loop: steps, what it tells, when it saves, how it ends."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.utils import counters

from dflare.errors import CheckpointError
from dflare.training.drafter.export import export_drafter
from dflare.training.errors import TrainingError
from dflare.training.loss.acceptance import Acceptance
from dflare.training.run.monitor import Monitor
from dflare.training.run.snapshot import check_disk, full_weights
from dflare.training.run.trainer import Trainer


class Interrupted(TrainingError):
    """The run was asked to stop and has saved itself."""


def train(trainer: Trainer) -> Acceptance | None:
    """Train to the end, validate and export to ``<output>/drafter``.

    Args:
        trainer: Built, and put back to its snapshot where it resumes.

    Returns:
        Acceptance on the held-out sequences, if there are any.

    Raises:
        Interrupted: SIGINT or SIGTERM came to any rank; a snapshot is written.
        TrainingError: Something is not finite, memory or disk is full; the last snapshot stays.
    """
    corpus, clock = trainer.corpus, trainer.clock
    monitor = Monitor(trainer.config, trainer.ranks.leads, clock.steps)
    if trainer.ranks.leads:
        check_disk(trainer.folder, trainer.drafter)
    monitor.say(
        f"{len(corpus)} sequences, {int(corpus.offsets[-1])} tokens "
        f"({int(corpus.supervised.sum())} supervised), {len(trainer.held_out)} held out; "
        f"drafter {sum(p.numel() for p in trainer.drafter.parameters()) / 1e6:.1f}M parameters; "
        f"{clock.total_steps} steps, {clock.steps} of them done"
    )
    try:
        with _signals(trainer), monitor:
            _train(trainer, monitor)
            acceptance = _validate(trainer, monitor)
    except OSError as error:
        raise TrainingError(
            f"{trainer.folder}: cannot be written after step {clock.steps} ({error}); "
            "make room and go on with --resume"
        ) from error
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of device memory after step {clock.steps}: {error}. Lower data.batch_size or "
            "data.anchors, raise run.accumulate, set run.checkpoint_activations=true, or a smaller "
            "objective.chunk_tokens; then --resume"
        ) from error
    state = full_weights(trainer.drafter)
    if trainer.ranks.leads:
        try:
            folder = export_drafter(trainer.drafter, state, trainer.folder / "drafter")
        except CheckpointError as error:
            raise TrainingError(
                f"{error}. The run is done and saved: once that is mended, --resume exports it"
            ) from error
        monitor.say(f"exported to {folder}")
    return acceptance


def _train(trainer: Trainer, monitor: Monitor) -> None:
    clock, run = trainer.clock, trainer.config.run
    trainer.drafter.train()
    before = clock.minutes
    started = reported = saved = time.monotonic()
    first = True
    while clock.progress() < 1.0:
        compiled, begun = counters["frames"]["total"], time.monotonic()
        trainer.train_step()
        now = time.monotonic()
        cold = first or counters["frames"]["total"] > compiled
        first = False
        # Clocks and signals differ between ranks, and all must take the same decisions.
        clock.minutes, seconds, asked, save = trainer.ranks.largest(
            [
                before + (now - started) / 60,
                now - begun if cold else 0.0,
                float(trainer.stop_asked),
                float(now - saved > 60 * run.save_minutes),
            ]
        )
        clock.cold_minutes += seconds / 60
        ends = clock.progress() >= 1.0
        if clock.steps % run.log_every == 0 or ends:
            _report(trainer, monitor, reported)
            reported = time.monotonic()
        if run.validate_every is not None and clock.steps % run.validate_every == 0 and not ends:
            paused = time.monotonic()
            _validate(trainer, monitor)
            reported += time.monotonic() - paused
        if asked or save or ends:
            trainer.window.seconds += time.monotonic() - reported
            trainer.save()
            saved = reported = time.monotonic()
        if asked:
            raise Interrupted(f"stopped after step {clock.steps}; the run goes on with --resume")


def _report(trainer: Trainer, monitor: Monitor, since: float) -> None:
    """Log what was measured since the last line."""
    clock, window = trainer.clock, trainer.take_window()
    seconds = window.seconds + time.monotonic() - since
    acceptance = window.meter.result()[0]
    values: dict[str, Any] = {
        "loss": round(window.loss, 6),
        "gradient_norm": round(window.gradient_norm, 6),
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "seconds_per_step": round(seconds / window.steps, 4),
        "minutes": round(clock.minutes, 3),
        **acceptance.to_dict(),
    }
    if trainer.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainer.device)
        values["peak_gib"] = round(peak / 2**30, 2)
    monitor.log("train", clock.steps, values)
    done = max(clock.progress(), 1e-9)
    left = f"{clock.minutes * (1.0 / done - 1.0):.0f} min left"
    text = f"step {clock.steps} loss {window.loss:.3f} accept {acceptance.accept_length:.2f}"
    monitor.show(clock.progress(), text, left)


def _validate(trainer: Trainer, monitor: Monitor) -> Acceptance | None:
    if not len(trainer.held_out):
        return None
    acceptance = trainer.validate()
    monitor.log("validation", trainer.clock.steps, acceptance.to_dict())
    monitor.say(
        f"step {trainer.clock.steps}: held-out accept length {acceptance.accept_length:.3f} "
        f"(random anchors, {len(trainer.held_out)} sequences)"
    )
    return acceptance


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        if trainer.stop_asked:
            raise KeyboardInterrupt  # the second time means at once
        trainer.ask_to_stop()

    handlers = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
