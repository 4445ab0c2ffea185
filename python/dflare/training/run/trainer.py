"""What a run is made of, and one step of it."""

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function
from transformers import AutoConfig

from dflare.training.data.batches import Batch, Order, make_batch
from dflare.training.data.corpus import Corpus, check_mask_token, load_corpus, split
from dflare.training.data.served_target import ServedTarget
from dflare.training.data.tap_cache import TapCache
from dflare.training.data.target import Target, compute_dtype, load_target, target_path
from dflare.training.drafter.init import (
    build_drafter,
    init_layers,
    start_fusion,
    tap_ids,
    tap_sizes,
)
from dflare.training.drafter.model import Drafter
from dflare.training.errors import ConfigError, DataError, TrainingError
from dflare.training.loss.acceptance import Acceptance, AcceptanceMeter
from dflare.training.loss.block_loss import chunk_loss
from dflare.training.loss.vocabulary import LossHead, LossVocabulary
from dflare.training.run.clock import Clock
from dflare.training.run.config import TrainConfig
from dflare.training.run.optimizer import learning_rate, make_optimizer
from dflare.training.run.ranks import Ranks, start_ranks
from dflare.training.run.snapshot import FILE, load_snapshot, save_snapshot
from dflare.training.run.step import BlockStep
from dflare.training.run.window import Window

_VALIDATION_EPOCH = 2**31  # seeds the anchors of validation, which stay the same for the whole run
_TAP_SIZE_SEQUENCES = 16  # from which the sizes of the target's states are measured
_WIDTHS = 6  # widths of a batch where code is compiled for each; each a multiple of 128


class Trainer:
    """The state of a run, and one step of it; the loop is :func:`dflare.training.run.loop.train`.

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
        self.dtype = compute_dtype(self.device, run.dtype)
        self.folder = Path(run.output)
        self._prepare_folder(resume)

        self.target = target if target is not None else self.load_target(config)
        everything = self._load_corpus()
        self.drafter = self._start_drafter(everything, resume)
        self._vocabulary = self._loss_vocabulary()
        self._pad_to, self._run_chunk = 1, chunk_loss
        if self._compile:
            self._pad_to = 128 * math.ceil(config.data.max_length / (128 * _WIDTHS))
            # Widths x training and validation x sizes of the last chunk, with room to spare.
            torch._dynamo.config.recompile_limit = 64
            self._run_chunk = torch.compile(chunk_loss, dynamic=False)
        self._cache = self._open_cache()
        self._step = self._make_step(self._cache)
        self._validation_step = self._make_step(None)

        if self._compile:
            self.drafter.compile(dynamic=False)
        self._module: nn.Module = self.ranks.wrap(self.drafter, run.shard)
        self.optimizer = make_optimizer(self.drafter, config.optimizer)
        self._order = Order(self.corpus.lengths, config.data.batch_size, run.seed)
        self.clock = Clock(
            run.epochs * self._order.steps_per_epoch if run.steps is None else run.steps,
            run.max_minutes,
        )
        self.window = self._new_window()
        if resume:
            self._go_on()
        self.stop_asked = False

    def _load_corpus(self) -> Corpus:
        """Read the data, set some aside, and refuse what cannot be shared by all ranks."""
        data, accumulate = self.config.data, self.config.run.accumulate
        vocab_size = self.target.config.vocab_size
        everything = load_corpus([Path(name) for name in data.files], vocab_size, data.max_length)
        self.corpus, self.held_out = split(everything, data.held_out)
        if data.batch_size % (self.ranks.world * accumulate):
            raise ConfigError(
                f"data.batch_size is {data.batch_size}, expected a multiple of "
                f"{self.ranks.world} ranks x run.accumulate {accumulate}"
            )
        if len(self.corpus) < self.ranks.world:
            raise DataError(
                f"{len(self.corpus)} sequences are too few for {self.ranks.world} ranks"
            )
        return everything

    def _start_drafter(self, everything: Corpus, resume: bool) -> Drafter:
        """Make the drafter, on the device; a snapshot overwrites it if the run goes on."""
        section, run = self.config.drafter, self.config.run
        drafter = build_drafter(section, self.target, run.seed, run.checkpoint_activations)
        if drafter.architecture == "dflare" and section.init == "target" and not resume:
            sizes = tap_sizes(self.target, everything.first(_TAP_SIZE_SEQUENCES))
            start_fusion(drafter, init_layers(section, drafter.config), sizes)
        check_mask_token(section.mask_token_id, everything, self.target.config.vocab_size)
        return drafter.to(self.device)

    def _loss_vocabulary(self) -> LossVocabulary | None:
        """The tokens that the loss is over, if not all."""
        objective = self.config.objective
        if not objective.frequent:
            return None
        return LossVocabulary(
            self.corpus,
            self.target.config.vocab_size,
            objective.frequent,
            objective.random,
            self.config.run.seed,
        )

    def _go_on(self) -> None:
        fingerprint = self.corpus.fingerprint()
        state = load_snapshot(self.folder, self.drafter, self.optimizer, self.config, fingerprint)
        self.clock.steps, self.clock.minutes = state["step"], state["minutes"]
        self.clock.cold_minutes = state["cold_minutes"]
        self.window = self.window.go_on(state["window"], self.ranks)

    def _prepare_folder(self, resume: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.output {self.folder}: cannot be made ({error})") from error
        if not resume and (self.folder / FILE).exists():
            raise ConfigError(
                f"run.output {self.folder} holds a run; go on with --resume, or name another folder"
            )

    @staticmethod
    def load_target(config: TrainConfig) -> Target:
        """Load the target of a run as its trainer would, tapped."""
        device = start_ranks(config.run.device).device
        section, data = config.target, config.data
        dtype = compute_dtype(device, config.run.dtype)
        if data.server is not None and data.states is not None:
            depth = AutoConfig.from_pretrained(target_path(section.name)).get_text_config()
            taps = tap_ids(config.drafter, depth.num_hidden_layers)
            return ServedTarget(section.name, taps, data.server, Path(data.states), device, dtype)
        target = load_target(section.name, (), device, dtype, section.attention)
        return Target(target.model, tap_ids(config.drafter, target.config.num_hidden_layers))

    def _make_step(self, cache: TapCache | None) -> BlockStep:
        return BlockStep(
            self.target,
            self.drafter.config,
            self.config.objective,
            self.config.objective.chunk_tokens,
            self._compile and self.device.type == "cuda",
            cache,
            self._run_chunk,
            self.config.data.tap_noise,
        )

    def _open_cache(self) -> TapCache | None:
        name = self.config.data.tap_cache
        if name is None:
            return None
        width = (self.drafter.config.num_taps + 1) * self.drafter.config.hidden_size
        identity = {"target": self.config.target.name, "taps": list(self.target.taps)}
        return TapCache(Path(name), self.corpus, width, identity)

    def _new_window(self) -> Window:
        return Window(self.drafter.config.block_size - 1, self.device)

    def _autocast(self) -> AbstractContextManager:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def steps_done(self) -> int:
        """Steps of the run, those before a resume included."""
        return self.clock.steps

    @property
    def minutes(self) -> float:
        """Minutes of the run, those before a resume included."""
        return self.clock.minutes

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
        epoch, sequences = self._order.step(self.clock.steps)
        head = LossHead(self.target.head)
        if self._vocabulary is not None:
            head = self._vocabulary.head(self.target.head, sequences, self.clock.steps)
        parts = np.array_split(sequences[self.ranks.rank :: self.ranks.world], run.accumulate)
        with record_function("batch"):
            batches = [self._batch(self.corpus, part, epoch) for part in parts if len(part)]
        counts = torch.stack([batch.supervised.sum() for batch in batches])
        normaliser = self.ranks.sum(counts.sum()).clamp(min=1)
        progress = self.clock.schedule()
        gamma = torch.tensor(self.config.objective.gamma_at(progress), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(self.config.optimizer, progress)
        for number, (batch, part) in enumerate(zip(batches, parts, strict=False)):
            last = number == len(batches) - 1
            with self._synchronised(last), self._autocast():
                result = self._step.loss(
                    self._module, batch, part, head, gamma, normaliser, self._noise(part)
                )
                with record_function("backward"):
                    (result.loss * self.ranks.world).backward()
            supervised = batch.supervised.flatten(0, 1)
            self.window.meter.add(result.correct, supervised, result.loss)
        with record_function("optimizer"):
            norm = nn.utils.clip_grad_norm_(self.drafter.parameters(), self.config.optimizer.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.window.end_step(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self.clock.steps += 1

    def _noise(self, part: np.ndarray) -> torch.Generator | None:
        """Noise on the taps of a micro-batch: the same after a resume."""
        if not self.config.data.tap_noise:
            return None
        seed = np.random.SeedSequence([self.config.run.seed, self.clock.steps, int(part[0])])
        noise = torch.Generator(self.device)
        return noise.manual_seed(int(seed.generate_state(1)[0]))

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
        meter = AcceptanceMeter(self.drafter.config.block_size - 1, self.device)
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
                    self.drafter, batch, part, LossHead(self.target.head), one, one
                )
            meter.add(result.correct, batch.supervised.flatten(0, 1), result.loss)
        self.drafter.train()
        self.ranks.sum(meter.sums)
        return meter.result()[0]

    def take_window(self) -> Window:
        """Return what was measured since the last call, over all ranks, and start anew.

        Raises:
            TrainingError: A loss or a gradient was not finite.
        """
        window = self.window.over(self.ranks)
        self._check(window)
        self.window = self._new_window()
        return window

    def save(self) -> None:
        """Write a snapshot; all ranks must call this.

        Raises:
            TrainingError: A loss or a gradient was not finite, or the file cannot be written; the
                last snapshot stays.
        """
        window = self.window.over(self.ranks)
        self._check(window)
        state = {
            "step": self.clock.steps,
            "minutes": self.clock.minutes,
            "cold_minutes": self.clock.cold_minutes,
            "window": window.state(),
            "config": self.config.model_dump(mode="json"),
            "corpus": self.corpus.fingerprint(),
        }
        save_snapshot(self.folder, self.drafter, self.optimizer, state, self.ranks)

    def _check(self, window: Window) -> None:
        """Refuse to go on from a NaN: it is in the weights by now, and stays there."""
        problem = window.problem()
        if problem is None:
            return
        saved = self.folder / FILE
        kept = f"; the snapshot {saved} is from before" if saved.exists() else ""
        raise TrainingError(
            f"{problem} after step {self.clock.steps}{kept}. Lower optimizer.learning_rate or "
            "raise optimizer.warmup, and start again or --resume"
        )

    def ask_to_stop(self) -> None:
        """End the run after the step at hand, with a snapshot."""
        self.stop_asked = True
