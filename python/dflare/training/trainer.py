"""The training loop."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from dflare.errors import CheckpointError
from dflare.training.acceptance import Acceptance, AcceptanceMeter
from dflare.training.batches import Batch, epoch_batches, make_batch
from dflare.training.block_loss import chunk_loss
from dflare.training.config import TrainConfig
from dflare.training.data import Corpus, check_mask_token, load_corpus, split
from dflare.training.errors import ConfigError, DataError, TrainingError
from dflare.training.estimate import describe, estimate_run, free_memory
from dflare.training.export import export_drafter
from dflare.training.init import build_drafter, tap_ids
from dflare.training.monitor import Monitor
from dflare.training.objective import Objective
from dflare.training.optimizer import learning_rate, make_optimizer
from dflare.training.ranks import Ranks, start_ranks
from dflare.training.snapshot import FILE, full_weights, load_snapshot, save_snapshot
from dflare.training.step import BlockStep
from dflare.training.tap_cache import TapCache
from dflare.training.target import Target, load_target
from dflare.training.vocabulary import LossVocabulary

_VALIDATION_EPOCH = 2**31  # seeds the anchors of validation, which stay the same for the whole run
_WIDTHS = 6  # widths of a batch where code is compiled for each; each a multiple of 128


class Interrupted(TrainingError):
    """The run was asked to stop and has saved itself."""


def compute_dtype(device: torch.device) -> torch.dtype:
    """What products are computed in; weights, norms and the optimizer stay in float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Trainer:
    """A run: everything that it needs, and the loop.

    Args:
        config: What to do.
        target: The target, if it is loaded already; it must tap what the drafter taps.
        resume: Go on from the snapshot in the output folder.

    Raises:
        DFlareError: Whatever is wrong, before the first step.
    """

    def __init__(
        self, config: TrainConfig, target: Target | None = None, resume: bool = False
    ) -> None:
        self.config = config
        run = config.run
        self.ranks: Ranks = start_ranks(run.device)
        self.device = self.ranks.device
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        on_gpu = self.device.type == "cuda"
        self._compile = on_gpu if run.compile is None else run.compile
        self._dtype = compute_dtype(self.device)
        self._folder = Path(run.output)
        self._prepare_folder(resume)

        self.target = target if target is not None else self.load_target(config)
        vocab_size = self.target.config.vocab_size
        files = [Path(name) for name in config.data.files]
        everything = load_corpus(files, vocab_size, config.data.max_length)
        self.corpus, self.held_out = split(everything, config.data.held_out)
        if config.data.batch_size % (self.ranks.world * run.accumulate):
            raise ConfigError(
                f"data.batch_size is {config.data.batch_size}, expected a multiple of "
                f"{self.ranks.world} ranks x run.accumulate {run.accumulate}"
            )
        if len(self.corpus) < self.ranks.world:
            raise DataError(
                f"{len(self.corpus)} sequences are too few for {self.ranks.world} ranks"
            )

        self.drafter = build_drafter(
            config.drafter, self.target, run.seed, run.checkpoint_activations
        ).to(self.device)
        check_mask_token(config.drafter.mask_token_id, everything, vocab_size)
        self.objective = Objective(
            **config.objective.model_dump(exclude={"frequent", "random", "chunk_tokens"})
        )
        self._vocabulary = None
        if config.objective.frequent:
            self._vocabulary = LossVocabulary(
                self.corpus,
                vocab_size,
                config.objective.frequent,
                config.objective.random,
                run.seed,
            )
        self._run_chunk: Callable = chunk_loss
        self._pad_to = 1
        if self._compile:
            self._pad_to = 128 * math.ceil(config.data.max_length / (128 * _WIDTHS))
            # Widths x training and validation x sizes of the last chunk, with room to spare.
            torch._dynamo.config.recompile_limit = 64
            self._run_chunk = torch.compile(chunk_loss, dynamic=False)
        self._step = self._make_step(self._open_cache())
        self._validation_step = self._make_step(None)

        if self._compile:
            self.drafter.compile(dynamic=False)
        self._module: nn.Module = self.ranks.wrap(self.drafter, run.shard)
        self.optimizer = make_optimizer(self.drafter, config.optimizer, fused=on_gpu)
        self.steps_done = 0
        self.minutes = 0.0
        if resume:
            fingerprint = self.corpus.fingerprint()
            state = load_snapshot(self._folder, self.drafter, self.optimizer, config, fingerprint)
            self.steps_done, self.minutes = state["step"], state["minutes"]

        self._epoch, self._batches = -1, [np.zeros(0, dtype=np.int64)]
        self._meter = self._new_meter()
        self._stop_asked = False

    def _prepare_folder(self, resume: bool) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.output {self._folder}: cannot be made ({error})") from error
        if not resume and (self._folder / FILE).exists():
            raise ConfigError(
                f"run.output {self._folder} holds a run; go on with --resume, or name another "
                "folder"
            )

    @staticmethod
    def load_target(config: TrainConfig) -> Target:
        """Load the target of a run as its trainer would, tapped."""
        device = start_ranks(config.run.device).device
        section = config.target
        target = load_target(section.name, (), device, compute_dtype(device), section.attention)
        return Target(target.model, tap_ids(config.drafter, target.config.num_hidden_layers))

    def _make_step(self, cache: TapCache | None) -> BlockStep:
        return BlockStep(
            self.target,
            self.drafter.config,
            self.objective,
            self.config.objective.chunk_tokens,
            self._compile and self.device.type == "cuda",
            cache,
            self._run_chunk,
        )

    def _open_cache(self) -> TapCache | None:
        name = self.config.data.tap_cache
        if name is None:
            return None
        width = (self.drafter.config.num_taps + 1) * self.drafter.config.hidden_size
        identity = {"target": self.config.target.name, "taps": list(self.target.taps)}
        return TapCache(Path(name), self.corpus, width, identity)

    def _new_meter(self) -> AcceptanceMeter:
        return AcceptanceMeter(self.drafter.config.block_size - 1, self.device)

    def _autocast(self) -> AbstractContextManager:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a pass over the data."""
        return max(1, len(self.corpus) // min(self.config.data.batch_size, len(self.corpus)))

    @property
    def total_steps(self) -> int:
        """Steps after which the run ends, if its time does not end it before."""
        if self.config.run.steps is not None:
            return self.config.run.steps
        return self.config.run.epochs * self.steps_per_epoch

    def progress(self) -> float:
        """How much of the run is done, 0 to 1, by steps or by time, whichever is further."""
        share = self.steps_done / self.total_steps
        if self.config.run.max_minutes is not None:
            share = max(share, self.minutes / self.config.run.max_minutes)
        return min(1.0, share)

    def _batch(self, corpus: Corpus, sequences: np.ndarray, epoch: int) -> Batch:
        batch = make_batch(
            corpus,
            sequences,
            self.config.data.anchors,
            self.drafter.config.block_size,
            self.config.run.seed,
            epoch,
            self._pad_to,
        )
        return batch.to(self.device)

    def train_step(self) -> None:
        """Do one optimizer step."""
        run = self.config.run
        epoch, position = divmod(self.steps_done, self.steps_per_epoch)
        if epoch != self._epoch:
            size = self.config.data.batch_size
            self._batches = epoch_batches(self.corpus.lengths, size, run.seed, epoch)
            self._epoch = epoch
        sequences = self._batches[position]
        head, rows = self._head(sequences)
        parts = np.array_split(sequences[self.ranks.rank :: self.ranks.world], run.accumulate)
        with record_function("batch"):
            batches = [self._batch(self.corpus, part, epoch) for part in parts if len(part)]
        counts = torch.stack([batch.supervised.sum() for batch in batches])
        normaliser = self.ranks.sum(counts.sum()).clamp(min=1)
        progress = self.progress()
        gamma = torch.tensor(self.objective.gamma_at(progress), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, progress)
        for number, (batch, part) in enumerate(zip(batches, parts, strict=False)):
            last = number == len(batches) - 1
            with self._synchronised(last), self._autocast():
                result = self._step.loss(self._module, batch, part, head, rows, gamma, normaliser)
                with record_function("backward"):
                    (result.loss * self.ranks.world).backward()
            supervised = batch.supervised.flatten(0, 1)
            self._meter.add(result.correct, supervised, result.loss)
        with record_function("optimizer"):
            nn.utils.clip_grad_norm_(self.drafter.parameters(), self.config.optimizer.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1

    def _head(self, sequences: np.ndarray) -> tuple[Tensor, Tensor | None]:
        if self._vocabulary is None:
            return self.target.head, None
        rows = torch.from_numpy(self._vocabulary.rows(sequences, self.steps_done))
        rows = rows.to(self.device)
        return self.target.head[rows], rows

    def _synchronised(self, last: bool) -> AbstractContextManager:
        """Reduce gradients over ranks only with the last micro-batch."""
        if isinstance(self._module, DistributedDataParallel) and not last:
            return self._module.no_sync()
        if self.config.run.shard and self.ranks.world > 1:
            self._module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    @torch.no_grad()
    def validate(self) -> Acceptance:
        """Draft blocks of the held-out sequences, with all tokens of the vocabulary."""
        meter = self._new_meter()
        one = torch.ones((), device=self.device)
        size = max(
            1, self.config.data.batch_size // (self.ranks.world * self.config.run.accumulate)
        )
        # All ranks gather sharded weights together: each needs as many parts as the others. And
        # parts of one size need compiling once.
        even = len(self.held_out) // self.ranks.world
        even -= even % size if even > size else 0
        mine = np.arange(even) * self.ranks.world + self.ranks.rank
        self.drafter.eval()
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            batch = self._batch(self.held_out, part, _VALIDATION_EPOCH)
            with self._autocast():
                result = self._validation_step.loss(
                    self.drafter, batch, part, self.target.head, None, one, one
                )
            meter.add(result.correct, batch.supervised.flatten(0, 1), result.loss)
        self.drafter.train()
        self.ranks.sum(meter.sums)
        return meter.result()[0]

    def _save(self) -> None:
        state = {
            "step": self.steps_done,
            "minutes": self.minutes,
            "config": self.config.model_dump(mode="json"),
            "corpus": self.corpus.fingerprint(),
        }
        save_snapshot(self._folder, self.drafter, self.optimizer, state, self.ranks)

    def _report(self, monitor: Monitor, steps: int, seconds: float) -> None:
        """Log what was measured since the last report, and refuse to go on from a NaN."""
        self.ranks.sum(self._meter.sums)
        acceptance, loss_sum = self._meter.result()
        loss = loss_sum / max(steps, 1)
        self._meter = self._new_meter()
        if not math.isfinite(loss):
            saved = self._folder / FILE
            kept = f"; the snapshot {saved} is from before" if saved.exists() else ""
            raise TrainingError(
                f"the loss is {loss} after step {self.steps_done}{kept}. Lower "
                "optimizer.learning_rate or raise optimizer.warmup, and start again or --resume"
            )
        rate = learning_rate(self.config.optimizer, self.progress())
        values: dict[str, Any] = {
            "loss": round(loss, 6),
            "learning_rate": rate,
            "seconds_per_step": round(seconds / max(steps, 1), 4),
            "minutes": round(self.minutes, 3),
            **acceptance.to_dict(),
        }
        if self.device.type == "cuda":
            values["peak_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        monitor.log("train", self.steps_done, values)
        done = max(self.progress(), 1e-9)
        left = f"{self.minutes * (1.0 / done - 1.0):.0f} min left"
        text = f"step {self.steps_done} loss {loss:.3f} accept {acceptance.accept_length:.2f}"
        monitor.show(self.progress(), text, left)

    def _log_validation(self, monitor: Monitor) -> Acceptance | None:
        if not len(self.held_out):
            return None
        acceptance = self.validate()
        monitor.log("validation", self.steps_done, acceptance.to_dict())
        monitor.say(
            f"step {self.steps_done}: held-out accept length {acceptance.accept_length:.3f} "
            f"(teacher-forced, {len(self.held_out)} sequences)"
        )
        return acceptance

    def _forecast(self) -> str:
        parameters = sum(p.numel() for p in self.target.model.parameters())
        estimate = estimate_run(
            self.config,
            self.drafter,
            parameters,
            float(self.corpus.lengths.mean()),
            self._dtype,
            self.device,
            self.ranks.world,
        )
        steps = None if self.config.run.max_minutes is not None else self.total_steps
        return describe(estimate, steps, free_memory(self.device))

    def run(self) -> Acceptance | None:
        """Train to the end, validate and export to ``<output>/drafter``.

        Returns:
            Acceptance on the held-out sequences, if there are any.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a snapshot is written.
            TrainingError: The loss is not finite, memory or disk is full; the last snapshot stays.
        """
        monitor = Monitor(self._folder, self.ranks.leads, self.steps_done)
        monitor.say(
            f"{len(self.corpus)} sequences, {int(self.corpus.offsets[-1])} tokens "
            f"({int(self.corpus.supervised.sum())} supervised), {len(self.held_out)} held out; "
            f"drafter {sum(p.numel() for p in self.drafter.parameters()) / 1e6:.1f}M parameters"
        )
        monitor.say(self._forecast())
        handlers = {
            number: signal.signal(number, self._ask_to_stop)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            with monitor:
                self._loop(monitor)
                acceptance = self._log_validation(monitor)
        except OSError as error:
            raise TrainingError(
                f"{self._folder}: cannot be written after step {self.steps_done} ({error}); make "
                "room and go on with --resume"
            ) from error
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of device memory after step {self.steps_done}: {error}. Lower "
                "data.batch_size or data.anchors, raise run.accumulate, set "
                "run.checkpoint_activations=true, or a smaller objective.chunk_tokens; then "
                "--resume"
            ) from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        state = full_weights(self.drafter)
        if self.ranks.leads:
            try:
                folder = export_drafter(self.drafter, state, self._folder / "drafter")
            except CheckpointError as error:
                raise TrainingError(
                    f"{error}. The run is done and saved: once that is mended, --resume exports it"
                ) from error
            monitor.say(f"exported to {folder}")
        return acceptance

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if self._stop_asked:
            raise KeyboardInterrupt  # the second time means at once
        self._stop_asked = True

    def _loop(self, monitor: Monitor) -> None:
        run = self.config.run
        self.drafter.train()
        before = self.minutes
        started = reported = saved = time.monotonic()
        steps = 0
        while self.progress() < 1.0:
            self.train_step()
            steps += 1
            due = self.steps_done % run.log_every == 0 or self.steps_done >= self.total_steps
            due = due or (self.ranks.world == 1 and self._stop_asked)
            if due:
                now = time.monotonic()
                # Clocks differ between ranks and all must take the same decisions.
                self.minutes = self.ranks.agree(before + (now - started) / 60)
                self._report(monitor, steps, now - reported)
                asked = self.ranks.agree(float(self._stop_asked))
                if asked:
                    self._save()
                    raise Interrupted(
                        f"stopped after step {self.steps_done}; the run goes on with --resume"
                    )
                if self.ranks.agree(float(now - saved > 60 * run.save_minutes)):
                    self._save()
                    saved = time.monotonic()
                steps, reported = 0, time.monotonic()
            if (
                run.validate_every is not None
                and self.steps_done % run.validate_every == 0
                and self.progress() < 1.0
            ):
                self._log_validation(monitor)
                reported = time.monotonic()
        self._save()
