"""A run around its steps: what it tells, when it saves, how it ends."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.utils import counters

from dflare.errors import CheckpointError
from dflare.training.drafter.export import export_drafter
from dflare.training.errors import TrainingError
from dflare.training.loss.acceptance import Acceptance
from dflare.training.run.estimate import check_disk, describe, estimate_run, free_memory
from dflare.training.run.monitor import Monitor
from dflare.training.run.snapshot import FILE, full_weights

if TYPE_CHECKING:
    from dflare.training.run.trainer import Trainer


class Interrupted(TrainingError):
    """The run was asked to stop and has saved itself."""


class Loop:
    """Trains to the end.

    Args:
        trainer: Built, and put back to its snapshot where it resumes.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.monitor = Monitor(trainer.folder, trainer.ranks.leads, trainer.clock.steps)

    def run(self) -> Acceptance | None:
        """See :meth:`Trainer.run`."""
        trainer = self.trainer
        corpus = trainer.corpus
        self.monitor.say(
            f"{len(corpus)} sequences, {int(corpus.offsets[-1])} tokens "
            f"({int(corpus.supervised.sum())} supervised), {len(trainer.held_out)} held out; "
            f"drafter {sum(p.numel() for p in trainer.drafter.parameters()) / 1e6:.1f}M parameters"
        )
        self.monitor.say(self._forecast())
        try:
            with self._signals(), self.monitor:
                self._train()
                acceptance = self._validate()
        except OSError as error:
            raise TrainingError(
                f"{trainer.folder}: cannot be written after step {trainer.clock.steps} ({error}); "
                "make room and go on with --resume"
            ) from error
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of device memory after step {trainer.clock.steps}: {error}. Lower "
                "data.batch_size or data.anchors, raise run.accumulate, set "
                "run.checkpoint_activations=true, or a smaller objective.chunk_tokens; then "
                "--resume"
            ) from error
        state = full_weights(trainer.drafter)
        if trainer.ranks.leads:
            self._export(state)
        return acceptance

    def _forecast(self) -> str:
        trainer, clock = self.trainer, self.trainer.clock
        estimate = estimate_run(
            trainer.config,
            trainer.drafter,
            trainer.target.model,
            float(trainer.corpus.lengths.mean()),
            trainer.dtype,
            trainer.device,
            trainer.ranks.world,
        )
        if trainer.ranks.leads:
            saved = (trainer.folder / FILE).exists()
            check_disk(trainer.folder, estimate.snapshot_bytes, saved)
        steps = max(0, clock.total_steps - clock.steps)
        minutes = None if clock.max_minutes is None else max(0.0, clock.max_minutes - clock.minutes)
        return describe(
            estimate, steps, trainer.steps_reading(steps), free_memory(trainer.device), minutes
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: Any) -> None:
            if self.trainer.stop_asked:
                raise KeyboardInterrupt  # the second time means at once
            self.trainer.ask_to_stop()

        handlers = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _train(self) -> None:
        trainer, clock, run = self.trainer, self.trainer.clock, self.trainer.config.run
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
            minutes, seconds, asked, save = trainer.ranks.largest(
                [
                    before + (now - started) / 60,
                    now - begun if cold else 0.0,
                    float(trainer.stop_asked),
                    float(now - saved > 60 * run.save_minutes),
                ]
            )
            clock.minutes = minutes
            clock.cold_minutes += seconds / 60
            ends = clock.progress() >= 1.0
            if clock.steps % run.log_every == 0 or ends:
                self._report(reported)
                reported = time.monotonic()
            if (
                run.validate_every is not None
                and clock.steps % run.validate_every == 0
                and not ends
            ):
                paused = time.monotonic()
                self._validate()
                reported += time.monotonic() - paused
            if asked or save or ends:
                trainer.window.seconds += time.monotonic() - reported
                trainer.save()
                saved = reported = time.monotonic()
            if asked:
                raise Interrupted(
                    f"stopped after step {clock.steps}; the run goes on with --resume"
                )

    def _report(self, since: float) -> None:
        """Log what was measured since the last line."""
        trainer = self.trainer
        clock = trainer.clock
        window = trainer.take_window()
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
        self.monitor.log("train", clock.steps, values)
        done = max(clock.progress(), 1e-9)
        left = f"{clock.minutes * (1.0 / done - 1.0):.0f} min left"
        text = f"step {clock.steps} loss {window.loss:.3f} accept {acceptance.accept_length:.2f}"
        self.monitor.show(clock.progress(), text, left)

    def _validate(self) -> Acceptance | None:
        trainer = self.trainer
        if not len(trainer.held_out):
            return None
        acceptance = trainer.validate()
        self.monitor.log("validation", trainer.clock.steps, acceptance.to_dict())
        self.monitor.say(
            f"step {trainer.clock.steps}: held-out accept length {acceptance.accept_length:.3f} "
            f"(teacher-forced, {len(trainer.held_out)} sequences)"
        )
        return acceptance

    def _export(self, state: dict[str, torch.Tensor]) -> None:
        try:
            folder = export_drafter(self.trainer.drafter, state, self.trainer.folder / "drafter")
        except CheckpointError as error:
            raise TrainingError(
                f"{error}. The run is done and saved: once that is mended, --resume exports it"
            ) from error
        self.monitor.say(f"exported to {folder}")
