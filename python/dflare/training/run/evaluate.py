"""Accept length of a drafter on prompts, beside prompt lookup on the same prompts."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dflare.checkpoint import check_pair
from dflare.training.data.corpus import Corpus, load_corpus, split
from dflare.training.data.prompts import encode, read_prompts, stop_tokens
from dflare.training.data.target import Target, load_target, load_tokenizer, target_path
from dflare.training.drafter.export import load_drafter
from dflare.training.drafter.model import Drafter
from dflare.training.errors import ConfigError
from dflare.training.run.config import load_config
from dflare.training.run.prompt_lookup import simulate
from dflare.training.run.ranks import start_ranks
from dflare.training.run.speculate import decode


@dataclass(frozen=True)
class Score:
    """Acceptance over all verify steps of a set of prompts.

    Args:
        steps: Verify steps.
        tokens: Tokens that they added.
        histogram: For 1 .. B tokens, how many steps added that many.
    """

    steps: int
    tokens: int
    histogram: list[int]

    @classmethod
    def of(cls, emitted: Sequence[Sequence[int]], block_size: int) -> "Score":
        """Count steps; ``emitted`` has the tokens of each step of each prompt."""
        histogram = [0] * block_size
        for prompt in emitted:
            for tokens in prompt:
                histogram[tokens - 1] += 1
        tokens = sum(count * size for size, count in enumerate(histogram, 1))
        return cls(sum(histogram), tokens, histogram)

    @property
    def accept_length(self) -> float:
        """Tokens a verify step, the target's own included."""
        return self.tokens / max(self.steps, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; ``reached[j-1]``: share of steps that kept j drafts or more."""
        reached = [sum(self.histogram[j:]) / max(self.steps, 1) for j in range(1, self.block_size)]
        return {
            "accept_length": round(self.accept_length, 4),
            "steps": self.steps,
            "tokens": self.tokens,
            "reached": [round(share, 4) for share in reached],
            "histogram": self.histogram,
        }

    @property
    def block_size(self) -> int:
        """B."""
        return len(self.histogram)


def held_out_prompts(corpus: Corpus) -> list[list[int]]:
    """Return the prompts of sequences that were set aside: what is before their first answer."""
    return [
        corpus.tokens(i)[: int(corpus.mask(i).argmax())].tolist()
        for i in range(len(corpus))
        if corpus.mask(i).argmax() > 0
    ]


def evaluate(
    target: Target,
    drafter: Drafter,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 0.0,
    rows: int = 16,
) -> dict[str, Any]:
    """Decode prompts speculatively and count.

    Args:
        target: Tapped as the drafter wants.
        drafter: On the same device.
        prompts: Token ids.
        max_new_tokens: Tokens of an answer.
        stop_ids: Tokens that end an answer.
        temperature: 0 for greedy.
        rows: Prompts side by side.

    Returns:
        The drafter's score, prompt lookup's, and the conditions.
    """
    started = time.monotonic()
    size = drafter.config.block_size
    # Prompts of similar length side by side: less padding, the same result.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    drafted, looked_up = [], []
    for start in range(0, len(order), rows):
        part = [prompts[i] for i in order[start : start + rows]]
        answers = decode(target, drafter, part, max_new_tokens, stop_ids, temperature)
        for prompt, answer in zip(part, answers, strict=True):
            drafted.append(answer.emitted)
            looked_up.append(simulate(prompt, answer.ids, size - 1))
    return {
        "prompts": len(prompts),
        "block_size": size,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "drafter": Score.of(drafted, size).to_dict(),
        "prompt_lookup": Score.of(looked_up, size).to_dict(),
        "seconds": round(time.monotonic() - started, 1),
        "device": str(target.device.type),
        "dtype": str(target.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write ``evaluation.json`` and ``evaluation.png`` (the plot needs matplotlib).

    Args:
        report: Results of :func:`evaluate` by the name of their set of prompts.
        folder: Destination.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 3.6 * len(report)), layout="constrained")
    axes = figure.subplots(len(report), 2, squeeze=False)
    for (name, result), (left, right) in zip(report.items(), axes, strict=True):
        slots = range(1, result["block_size"])
        for label in ("drafter", "prompt_lookup"):
            score = result[label]
            legend = f"{label.replace('_', ' ')}, accept length {score['accept_length']:.2f}"
            left.plot(slots, score["reached"], marker="o", label=legend)
            shift = -0.2 if label == "drafter" else 0.2
            right.bar(
                [size + shift for size in range(1, result["block_size"] + 1)],
                [count / max(score["steps"], 1) for count in score["histogram"]],
                width=0.4,
                label=label.replace("_", " "),
            )
        left.set(
            title=f"{name}: {result['prompts']} prompts, temperature {result['temperature']}",
            xlabel="slot",
            ylabel="share of steps accepted that far",
            ylim=(0, 1),
        )
        right.set(title="tokens a verify step", xlabel="tokens", ylabel="share of steps")
        left.legend()
        right.legend()
    figure.savefig(folder / "evaluation.png", dpi=110)


def run_evaluation(
    draft: str,
    target_name: str,
    prompt_files: list[Path],
    held_out: Path | None,
    output: Path,
    *,
    max_new_tokens: int,
    temperature: float,
    limit: int | None,
    rows: int,
    device: str,
) -> dict[str, Any]:
    """Evaluate a drafter on disk and write the report; the arguments are those of the command.

    Returns:
        Results of :func:`evaluate` by the name of their set of prompts.

    Raises:
        ConfigError: No prompts are named.
        DFlareError: Drafter, target or prompts cannot be used.
    """
    if not prompt_files and held_out is None:
        raise ConfigError("nothing to decode: give --prompts FILE, --held-out CONFIG.yaml, or both")
    drafter = load_drafter(draft)
    path = target_path(target_name)
    check_pair(drafter.config, path, draft)
    where = start_ranks(device).device
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    target = load_target(path, drafter.config.target_layer_ids, where, dtype)
    tokenizer = load_tokenizer(path)
    sets = {
        file.stem: [encode(tokenizer, messages) for messages in read_prompts(file)]
        for file in prompt_files
    }
    if held_out is not None:
        config = load_config(held_out)
        files = [Path(name) for name in config.data.files]
        corpus = load_corpus(files, target.config.vocab_size, config.data.max_length)
        sets["held_out"] = held_out_prompts(split(corpus, config.data.held_out)[1])
    stop_ids = stop_tokens(tokenizer, target.model.generation_config)
    drafter.to(where)
    report = {}
    for name, prompts in sets.items():
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=where.type == "cuda"):
            result = evaluate(
                target, drafter, prompts[:limit], max_new_tokens, stop_ids, temperature, rows
            )
        report[name] = {"draft": draft, "target": target_name, **result}
        own, lookup = result["drafter"], result["prompt_lookup"]
        print(
            f"{name}: accept length {own['accept_length']:.3f} ({own['steps']} steps, "
            f"{result['prompts']} prompts), prompt lookup {lookup['accept_length']:.3f}"
        )
    write_report(report, output)
    return report
