"""Evaluation of a drafter on disk: from prompts to a report."""

import json
from pathlib import Path
from typing import Any

import torch

from dflare.checkpoint import check_pair
from dflare.training.data.corpus import load_corpus, split
from dflare.training.data.prompts import read_prompts, stop_tokens, template_arguments
from dflare.training.data.target import Target, load_target, load_tokenizer, target_path
from dflare.training.drafter.export import load_drafter
from dflare.training.drafter.model import Drafter
from dflare.training.errors import ConfigError
from dflare.training.run.answers import answered, held_out_prompts, known_answers
from dflare.training.run.config import load_config
from dflare.training.run.evaluate import TREE_TOKENS, check_by_decoding, compare, evaluate
from dflare.training.run.ranks import start_ranks


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
    against: str | None = None,
    check: int = 0,
    template: str = "{}",
    max_new_tokens: int,
    temperature: float,
    limit: int | None,
    rows: int,
    device: str,
) -> dict[str, Any]:
    """Evaluate a drafter on disk and write the report; the arguments are those of the command.

    Returns:
        Results of :func:`evaluate` and :func:`compare` by the name of their set of prompts.

    Raises:
        ConfigError: No prompts are named.
        DFlareError: Drafter, target or prompts cannot be used.
    """
    if not prompt_files and held_out is None:
        raise ConfigError("nothing to draft: give --prompts FILE, --held-out CONFIG.yaml, or both")
    arguments = template_arguments(template)
    path = target_path(target_name)
    drafters = [_load_drafter(name, path) for name in (draft, against) if name is not None]
    where = start_ranks(device).device
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = load_target(path, (), where, dtype)
    pairs = [(Target(model.model, d.config.target_layer_ids), d.to(where)) for d in drafters]
    tokenizer = load_tokenizer(path)
    stop_ids = stop_tokens(tokenizer, model.model.generation_config)
    how = (max_new_tokens, stop_ids, temperature, rows)
    sets = {
        file.stem: answered(model, tokenizer, read_prompts(file)[:limit], *how, arguments)
        for file in prompt_files
    }
    if held_out is not None:
        prompts = _held_out_of(held_out, model.config.vocab_size)
        sets["held_out"] = known_answers(model, prompts[:limit], *how)
    report = {}
    for name, answers in sets.items():
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=where.type == "cuda"):
            result, *others = (evaluate(*pair, answers) for pair in pairs)
        if check:
            check_by_decoding(*pairs[0], answers[:check], max_new_tokens, stop_ids)
        conditions = {"draft": draft, "target": target_name, "max_new_tokens": max_new_tokens}
        report[name] = {**conditions, "temperature": temperature, **result}
        for other in others:
            compared = compare(result["by_prompt"], other["by_prompt"])
            report[name]["against"] = {"draft": against, **compared}
        print(_summary(name, report[name]))
    write_report(report, output)
    return report


def _summary(name: str, result: dict[str, Any]) -> str:
    """Results of a set of prompts in a line, or in two if there is something to compare with."""
    own, lookup, shown = result["drafter"], result["prompt_lookup"], str(TREE_TOKENS[2])
    text = (
        f"{name}: accept length {own['accept_length']:.3f} ({own['steps']} steps, "
        f"{result['prompts']} prompts), trees of {shown} tokens {result['tree'][shown]:.3f}, "
        f"with look-ups {result['tree_and_lookup'][shown]:.3f}, prompt lookup alone "
        f"{lookup['accept_length']:.3f}"
    )
    if compared := result.get("against"):
        low, high = compared["interval"]
        text += f"\n{name}: {compared['gain']:+.1%} ({low:+.1%} .. {high:+.1%}) against "
        text += compared["draft"]
    return text


def _held_out_of(config_file: Path, vocab_size: int) -> list[list[int]]:
    """The prompts that a run sets aside."""
    data = load_config(config_file).data
    corpus = load_corpus([Path(name) for name in data.files], vocab_size, data.max_length)
    return held_out_prompts(split(corpus, data.held_out)[1])


def _load_drafter(draft: str, path: str) -> Drafter:
    drafter = load_drafter(draft)
    check_pair(drafter.config, path, draft)
    return drafter
