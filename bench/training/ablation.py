"""DFlash, DFlare and DFlare with shared K/V, each with decay and with D-PACE, over several seeds.

    python bench/training/ablation.py configs/demo/gpu-train.yaml --minutes 25 --steps 1500
    python bench/training/ablation.py CONFIG.yaml --report docs   # from the runs there are

All runs see the same data in the same order for the same number of steps, and their feed-forward is
sized so that they have the same number of parameters. Runs are kept in OUTPUT/results.jsonl, each
with the conditions under which it was made; the same command goes on with those that are missing,
and a command with other conditions is refused. --report rewrites the part of DOCS/results.md
between the ablation markers from what the runs say of themselves.
"""

import hashlib
import itertools
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from ablation_report import table, write_report

from dflare.errors import DFlareError
from dflare.processor import device_name
from dflare.training.data.corpus import load_corpus
from dflare.training.data.prompts import read_lines, stop_tokens
from dflare.training.data.target import Target, compute_dtype, load_tokenizer, target_path
from dflare.training.drafter.init import draft_config
from dflare.training.drafter.model import Drafter
from dflare.training.errors import ConfigError
from dflare.training.run.answers import held_out_prompts, known_answers
from dflare.training.run.config import TrainConfig, load_config
from dflare.training.run.evaluate import evaluate
from dflare.training.run.loop import train
from dflare.training.run.trainer import Trainer

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "DFlash": {"architecture": "dflash", "shared_kv": False},
    "DFlare, shared K/V": {"architecture": "dflare", "shared_kv": True},
    "DFlare": {"architecture": "dflare", "shared_kv": False},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    # DFlash takes 7, 5 and 4 for blocks of 16, 10 and 8; the demo's block of 6 goes on from there.
    "decay, gamma 2.5": {"name": "decay", "gamma": 2.5, "gamma_end": None},
    "decay, gamma 3.5": {"name": "decay", "gamma": 3.5, "gamma_end": None},
    "D-PACE": {"name": "dpace", "alpha": 0.5},
}
_WIDTH_STEP = 16  # feed-forward widths are multiples of this


@dataclass(frozen=True)
class Variant:
    """One run of the grid."""

    architecture: str
    objective: str
    seed: int

    def key(self) -> list[Any]:
        """What identifies it in results.jsonl."""
        return [self.architecture, self.objective, self.seed]


def parameters(section: Any, target: Target) -> int:
    """Count the parameters of a drafter without allocating them."""
    with torch.device("meta"):
        drafter = Drafter(draft_config(section, target), section.architecture, section.shared_kv)
    return sum(parameter.numel() for parameter in drafter.parameters())


def sized(config: TrainConfig, architecture: str, target: Target) -> Any:
    """Return the drafter section of an architecture, as large as the configuration's own."""
    base = config.drafter
    budget = parameters(base, target)
    section = base.model_copy(update=ARCHITECTURES[architecture])
    one = section.model_copy(update={"intermediate_size": _WIDTH_STEP})
    two = section.model_copy(update={"intermediate_size": 2 * _WIDTH_STEP})
    fixed = parameters(one, target)
    growth = parameters(two, target) - fixed
    steps = 1 + round((budget - fixed) / growth)
    if steps < 1:
        raise typer.BadParameter(f"{architecture} has no room for a feed-forward in {budget}")
    return section.model_copy(update={"intermediate_size": _WIDTH_STEP * steps})


def run_variant(
    config: TrainConfig,
    variant: Variant,
    target: Target,
    folder: Path,
    made: dict[str, Any],
    rows: int,
) -> dict[str, Any]:
    """Train one variant and measure it on the held-out prompts.

    Args:
        config: What all runs share.
        variant: Which run.
        target: Tapped as the configuration says.
        folder: Of the runs.
        made: The :func:`conditions`; kept in the result.
        rows: Prompts decoded side by side.

    Returns:
        A line of results.jsonl.
    """
    section = sized(config, variant.architecture, target)
    new_tokens = made["new_tokens"]
    name = "-".join(map(str, variant.key())).replace(" ", "").replace("/", "").replace(",", "-")
    name += f"-{digest(made)}"  # a run that was interrupted goes on only under its own conditions
    run = config.run.model_copy(update={"output": str(folder / name), "seed": variant.seed})
    objective = config.objective.model_copy(update=OBJECTIVES[variant.objective])
    own = config.model_copy(update={"drafter": section, "run": run, "objective": objective})
    started = time.monotonic()
    resume = (folder / name / "snapshot.pt").exists()
    trainer = Trainer(own, target, resume=resume)
    teacher_forced = train(trainer)
    tokenizer = load_tokenizer(target_path(config.target.name))
    stops = stop_tokens(tokenizer, target.model.generation_config)
    prompts = held_out_prompts(trainer.held_out)
    device = target.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        answers = known_answers(target, prompts, new_tokens, stops, rows=rows)
        decoded = evaluate(target, trainer.drafter.eval(), answers)
    return {
        "variant": variant.key(),
        "parameters": sum(p.numel() for p in trainer.drafter.parameters()),
        "intermediate_size": section.intermediate_size,
        "accept_length": decoded["drafter"]["accept_length"],
        "reached": decoded["drafter"]["reached"],
        "by_prompt": decoded["by_prompt"],
        "prompt_lookup": decoded["prompt_lookup"]["accept_length"],
        "teacher_forced": teacher_forced.accept_length if teacher_forced else None,
        "prompts": len(prompts),
        "train_minutes": round(trainer.minutes, 2),
        "minutes": round((time.monotonic() - started) / 60, 2),
        "sequences": len(trainer.corpus),
        "tokens": int(trainer.corpus.offsets[-1]),
        "hardware": device_name(cuda=device == "cuda"),
        "torch": torch.__version__,
        "conditions": made,
        "command": shlex.join(["python", *sys.argv]),
    }


def conditions(config: TrainConfig, device: str, corpus: str, new_tokens: int) -> dict[str, Any]:
    """Return everything that decides what the runs of the grid compute, but for their seed.

    Args:
        config: What all runs share.
        device: ``cpu`` or ``cuda``.
        corpus: Fingerprint of the data.
        new_tokens: Tokens of an answer that is decoded.
    """
    content = config.model_dump(mode="json")
    for place in ("files", "tap_cache"):
        del content["data"][place]
    products = str(compute_dtype(torch.device(device), config.run.dtype)).removeprefix("torch.")
    return {
        **content,
        "run": {"steps": config.run.steps, "device": device, "products": products},
        "corpus": corpus,
        "new_tokens": new_tokens,
        "architectures": ARCHITECTURES,
        "objectives": OBJECTIVES,
    }


def digest(content: dict[str, Any]) -> str:
    """Identify a set of conditions."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _flat(content: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in content.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{before}{name}.") if nested else {before + name: value}
    return flat


def read_results(folder: Path, wanted: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the runs that are done.

    Args:
        folder: Of results.jsonl.
        wanted: Conditions under which they must have been made; none for those of the first run.

    Raises:
        ConfigError: A run was made under other conditions, so that it cannot be compared.
    """
    file = folder / "results.jsonl"
    if not file.exists():
        return []
    results = list(read_lines(file))
    for number, result in results:
        found = result.get("conditions")
        if found is None:
            raise ConfigError(f"{file}:{number}: does not say how it was made; remove the line")
        wanted = wanted or found
        if found != wanted:
            old, new = _flat(found), _flat(wanted)
            changes = ", ".join(
                f"{key} (was {old.get(key)!r}, is {new.get(key)!r})"
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key)
            )
            raise ConfigError(
                f"{file}:{number}: was made under other conditions: {changes}. Put them back, or "
                "name another --output"
            )
    return [result for _, result in results]


def run_grid(
    config: TrainConfig,
    grid: list[Variant],
    output: Path,
    minutes: float | None,
    new_tokens: int,
    rows: int,
) -> None:
    """Run the variants that results.jsonl lacks, then print the table.

    Args:
        config: What all runs share; ``run.steps`` says how long each is.
        grid: Which runs there are.
        output: Folder of runs and results.
        minutes: Start no run after this.
        new_tokens: Tokens of an answer that is decoded.
        rows: Prompts decoded side by side.

    Raises:
        ConfigError: The results there are were made under other conditions, or no sequence is held
            out to measure on.
        DFlareError: What stopped a run; repeat the call to go on.
    """
    started = time.monotonic()
    if not config.data.held_out:
        raise ConfigError("data.held_out is 0; the variants are measured on held-out prompts")
    target = Trainer.load_target(config)
    files = [Path(name) for name in config.data.files]
    corpus = load_corpus(files, target.config.vocab_size, config.data.max_length).fingerprint()
    made = conditions(config, target.device.type, corpus, new_tokens)
    output.mkdir(parents=True, exist_ok=True)
    done = [result["variant"] for result in read_results(output, made)]
    for variant in grid:
        if variant.key() in done:
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            break
        result = run_variant(config, variant, target, output, made, rows)
        with (output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    print(table(read_results(output, made)))


def main(
    config: Annotated[Path, typer.Argument(help="Training configuration that all runs share.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 1500,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 2,
    minutes: Annotated[float | None, typer.Option(help="Start no run after this.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer that is decoded.")] = 96,
    rows: Annotated[int, typer.Option(help="Prompts decoded side by side.")] = 64,
    output: Annotated[Path, typer.Option(help="Runs and results.")] = Path("runs/ablation"),
    report: Annotated[Path | None, typer.Option(help="Only write the report, into here.")] = None,
) -> None:
    """Run what is missing, then print the table."""
    try:
        if report is not None:
            results = read_results(output)
            if not results:
                raise ConfigError(f"{output}/results.jsonl: no runs to report; make them first")
            write_report(results, report)
            return
        fixed = [f"run.steps={steps}", "run.max_minutes=null", f"run.output={output}"]
        parsed = load_config(config, [*(overrides or []), *fixed])
        # Seeds outermost: whatever the time allows is a complete comparison.
        grid = [
            Variant(architecture, objective, seed)
            for seed, architecture, objective in itertools.product(
                range(seeds), ARCHITECTURES, OBJECTIVES
            )
        ]
        run_grid(parsed, grid, output, minutes, new_tokens, rows)
    except DFlareError as error:
        print(f"ablation: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
