"""From nothing but a target to a drafter with a model card: generate, train, evaluate, export.

Every stage goes on where an interruption left it: the same call may be repeated until it is done.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field, ValidationError, model_validator

from dflare.text_file import read_text
from dflare.training.data.prompts import read_openers, read_prompts
from dflare.training.data.settings import GenerationSettings, SynthSettings
from dflare.training.data.synth_run import open_synth
from dflare.training.data.target import load_target
from dflare.training.data.templates import read_templates
from dflare.training.drafter.draft_vocabulary import write_draft_vocabulary
from dflare.training.drafter.export import export_size
from dflare.training.drafter.init import draft_config
from dflare.training.drafter.model import Drafter
from dflare.training.errors import ConfigError
from dflare.training.run.config import TrainConfig, load_config
from dflare.training.run.evaluation_run import run_evaluation
from dflare.training.run.loop import train
from dflare.training.run.model_card import model_card
from dflare.training.run.snapshot import FILE
from dflare.training.run.trainer import Trainer
from dflare.training.section import Section

MAX_BYTES = 16 * 2**20  # of the shipped weights
_PROMPT_SHARE = 0.2  # of the generation time that self-written prompts may take
_BEAT_SECONDS = 5.0


class SynthStage(GenerationSettings):
    """Generation, beside the corpus that is there already.

    Args:
        self_written: Prompts that the target writes.
        templated: Conversations drawn from templates.
        templates: File of templates.
        minutes: Time for prompts and answers together.
        rows: Sequences side by side.
        openers: File with beginnings of prompts.
        exclude: Files with prompts that must not be in the data.
    """

    self_written: int = Field(default=0, ge=0)
    templated: int = Field(default=0, ge=0)
    templates: str | None = None
    minutes: float = Field(gt=0)
    rows: int = Field(gt=0)
    openers: str | None = None
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_prompts(self) -> "SynthStage":
        if self.templated and self.templates is None:
            raise ValueError("templated needs templates, the file that they are in")
        if not self.templated and not self.self_written:
            raise ValueError("nothing to answer: give templated or self_written")
        return self


class EvaluateStage(Section):
    """Evaluation.

    Args:
        prompts: Files with prompts.
        max_new_tokens: Tokens of an answer.
        rows: Prompts side by side.
    """

    prompts: tuple[str, ...] = Field(min_length=1)
    max_new_tokens: int = Field(gt=0)
    rows: int = Field(gt=0)


class PipelineConfig(Section):
    """The stages; file names are relative to the configuration's folder.

    Args:
        train: File with the training configuration.
        corpus: Data files that there are, as patterns.
        synth: Generation of more; none to train on the corpus alone.
        draft_vocabulary: Draft only this many tokens, the most frequent of the answers.
        evaluate: Evaluation.
    """

    train: str
    corpus: tuple[str, ...] = ()
    synth: SynthStage | None = None
    draft_vocabulary: int | None = Field(default=None, gt=0)
    evaluate: EvaluateStage

    @model_validator(mode="after")
    def _has_data(self) -> "PipelineConfig":
        if not self.corpus and self.synth is None:
            raise ValueError("no data: give corpus, synth, or both")
        return self


class Stages:
    """What is done, and how long generation took so far, in a file that survives everything.

    Args:
        file: Where it is kept.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.state: dict[str, Any] = {"synth_minutes": 0.0, "synth_done": False}
        if file.exists():
            self.state |= json.loads(file.read_text())

    def save(self) -> None:
        """Write the state, whole or not at all."""
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self.state))
        os.replace(partial, self._file)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Add the time of a block to ``synth_minutes``, every few seconds: it may be killed."""
        before, started = self.state["synth_minutes"], time.monotonic()
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(_BEAT_SECONDS):
                self.state["synth_minutes"] = before + (time.monotonic() - started) / 60
                self.save()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.state["synth_minutes"] = before + (time.monotonic() - started) / 60
            self.save()


def load_pipeline(path: Path) -> PipelineConfig:
    """Read a pipeline's YAML file.

    Raises:
        ConfigError: It cannot be read or has settings that make no sense.
    """
    try:
        return PipelineConfig.model_validate(yaml.safe_load(read_text(path, ConfigError)))
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _generate(
    stage: SynthStage, folder: Path, data: Path, training: TrainConfig, stages: Stages
) -> None:
    settings = SynthSettings(
        **stage.model_dump(include=set(GenerationSettings.model_fields)),
        openers=read_openers(folder / stage.openers) if stage.openers else ("",),
    )
    excluded = [messages for name in stage.exclude for messages in read_prompts(folder / name)]
    left = 60.0 * (stage.minutes - stages.state["synth_minutes"])
    started = time.monotonic()
    with (
        stages.counting(),
        open_synth(
            data,
            training.target.name,
            settings,
            excluded,
            None,
            generator="transformers",
            rows=stage.rows,
            device=training.run.device,
        ) as synth,
    ):
        synth.deadline = started + min(left, 60.0 * _PROMPT_SHARE * stage.minutes)
        prompts = synth.write_prompts(stage.self_written) if stage.self_written else []
        if stage.templates is not None:
            drawn = read_templates(folder / stage.templates).conversations(stage.seed)
            prompts += synth.choose(drawn, stage.templated)
        synth.deadline = started + left
        synth.answer(prompts)
    stages.state["synth_done"] = True
    stages.save()


def _check_size(training: TrainConfig) -> None:
    """Refuse a drafter that is too large to ship, before hours are spent on it."""
    target = load_target(training.target.name, attention=training.target.attention)
    section = training.drafter
    with torch.device("meta"):
        drafter = Drafter(draft_config(section, target), section.architecture, section.shared_kv)
    size = export_size(drafter)
    if size > MAX_BYTES:
        raise ConfigError(
            f"the drafter would have {size / 2**20:.1f} MiB of weights, more than the "
            f"{MAX_BYTES / 2**20:.1f} that may be shipped; lower drafter.intermediate_size or "
            "drafter.layers"
        )


def _training_config(
    config: PipelineConfig, config_file: Path, work: Path, overrides: list[str]
) -> TrainConfig:
    """The training configuration on all data that there is or will be, in the work folder."""
    folder = config_file.parent
    files = [file for pattern in config.corpus for file in sorted(folder.glob(pattern))]
    files += [work / "data.xz"] if config.synth is not None else []
    if not files:
        raise ConfigError(f"{config_file}: no file fits corpus {list(config.corpus)}")
    places = [f"data.files=[{', '.join(map(str, files))}]", f"run.output={work / 'train'}"]
    training = load_config(folder / config.train, [*places, *overrides])
    if training.data.tap_cache is None:
        return training
    places.append(f"data.tap_cache={work / 'taps'}")
    return load_config(folder / config.train, [*places, *overrides])


def run_pipeline(config_file: Path, work: Path, output: Path, overrides: list[str]) -> Path:
    """Run all stages that are not done yet.

    Args:
        config_file: YAML of :class:`PipelineConfig`.
        work: Folder of data, snapshots and logs.
        output: Folder of the result: drafter, model card, evaluation, log. Small enough to carry.
        overrides: ``section.key=value`` for the training configuration.

    Returns:
        ``output``.

    Raises:
        DFlareError: What stopped a stage; repeat the call to go on.
    """
    config, folder = load_pipeline(config_file), config_file.parent
    work.mkdir(parents=True, exist_ok=True)
    data, trained = work / "data.xz", work / "train"
    training = _training_config(config, config_file, work, overrides)
    if not (trained / "drafter" / "config.json").exists():
        _check_size(training)
    stages = Stages(work / "stages.json")
    if config.synth is not None and not stages.state["synth_done"]:
        _generate(config.synth, folder, data, training, stages)

    if not (trained / "drafter" / "config.json").exists():
        train(Trainer(training, resume=(trained / FILE).exists()))
    drafter, drafted = trained / "drafter", 1.0
    if config.draft_vocabulary is not None:
        every = [Path(file) for file in training.data.files]
        drafted = write_draft_vocabulary(
            drafter, work / "drafter", every, config.draft_vocabulary, force=True
        )
        drafter = work / "drafter"
    train_file = work / "train.yaml"
    train_file.write_text(yaml.safe_dump(training.model_dump(mode="json"), sort_keys=False))
    report = run_evaluation(
        str(drafter),
        training.target.name,
        [folder / name for name in config.evaluate.prompts],
        train_file,
        output,
        max_new_tokens=config.evaluate.max_new_tokens,
        temperature=0.0,
        limit=None,
        rows=config.evaluate.rows,
        device=training.run.device,
    )
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(drafter / name, output / name)
    shutil.copyfile(trained / "log.jsonl", output / "training.jsonl")
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(log) if line["kind"] == "train")
    tokens = config.draft_vocabulary, drafted
    card = model_card(training, last, report, tokens, " ".join(overrides))
    (output / "README.md").write_text(card, encoding="utf-8")
    return output
