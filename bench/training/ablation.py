"""DFlash, DFlare and DFlare with shared K/V, each with decay and with D-PACE, over several seeds.

    python bench/training/ablation.py configs/demo/gpu-train.yaml --minutes 25 --steps 1500
    python bench/training/ablation.py CONFIG.yaml --report docs   # from the runs there are

All runs see the same data in the same order for the same number of steps, and their feed-forward is
sized so that they have the same number of parameters. Runs are kept in OUTPUT/results.jsonl; the
same command goes on with those that are missing. --report rewrites the part of DOCS/results.md
between the ablation markers.
"""

import itertools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer

from dflare.training.config import TrainConfig, load_config
from dflare.training.evaluate import evaluate, held_out_prompts
from dflare.training.init import draft_config
from dflare.training.model import Drafter
from dflare.training.model_card import hardware
from dflare.training.prompts import stop_tokens
from dflare.training.target import Target, target_path
from dflare.training.trainer import Trainer

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "DFlash": {"architecture": "dflash", "shared_kv": False},
    "DFlare, shared K/V": {"architecture": "dflare", "shared_kv": True},
    "DFlare": {"architecture": "dflare", "shared_kv": False},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "decay": {"name": "decay", "gamma": 7.0, "gamma_end": None},
    "D-PACE": {"name": "dpace", "alpha": 0.5},
}
START, END = "<!-- ablation -->", "<!-- /ablation -->"
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
    config: TrainConfig, variant: Variant, target: Target, folder: Path, new_tokens: int, rows: int
) -> dict[str, Any]:
    """Train one variant and measure it on the held-out prompts."""
    section = sized(config, variant.architecture, target)
    name = "-".join(map(str, variant.key())).replace(" ", "").replace("/", "").replace(",", "-")
    run = config.run.model_copy(update={"output": str(folder / name), "seed": variant.seed})
    objective = config.objective.model_copy(update=OBJECTIVES[variant.objective])
    own = config.model_copy(update={"drafter": section, "run": run, "objective": objective})
    started = time.monotonic()
    resume = (folder / name / "snapshot.pt").exists()
    trainer = Trainer(own, target, resume=resume)
    teacher_forced = trainer.run()
    path = target_path(config.target.name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    stops = stop_tokens(tokenizer, target.model.generation_config)
    prompts = held_out_prompts(trainer.held_out)
    device = target.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        decoded = evaluate(target, trainer.drafter.eval(), prompts, new_tokens, stops, rows=rows)
    return {
        "variant": variant.key(),
        "parameters": sum(p.numel() for p in trainer.drafter.parameters()),
        "intermediate_size": section.intermediate_size,
        "steps": trainer.steps_done,
        "accept_length": decoded["drafter"]["accept_length"],
        "reached": decoded["drafter"]["reached"],
        "prompt_lookup": decoded["prompt_lookup"]["accept_length"],
        "teacher_forced": teacher_forced.accept_length if teacher_forced else None,
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "train_minutes": round(trainer.minutes, 2),
        "minutes": round((time.monotonic() - started) / 60, 2),
        "sequences": len(trainer.corpus),
        "tokens": int(trainer.corpus.offsets[-1]),
        "batch": [config.data.batch_size, config.data.anchors],
        "block_size": section.block_size,
        "hardware": hardware(device),
        "torch": torch.__version__,
    }


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the runs that are done."""
    file = folder / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """One row an architecture and objective: mean over seeds, with the range."""
    lines = [
        "| architecture | objective | parameters | seeds | accept length, mean (min .. max) | "
        "teacher-forced | share accepted to slot 1, 2, 3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for architecture, objective in itertools.product(ARCHITECTURES, OBJECTIVES):
        runs = [r for r in results if r["variant"][:2] == [architecture, objective]]
        if not runs:
            continue
        lengths = [run["accept_length"] for run in runs]
        forced = statistics.mean(run["teacher_forced"] for run in runs)
        reached = [statistics.mean(run["reached"][slot] for run in runs) for slot in range(3)]
        lines.append(
            f"| {architecture} | {objective} | {runs[0]['parameters'] / 1e6:.2f}M | {len(runs)} | "
            f"**{statistics.mean(lengths):.3f}** ({min(lengths):.3f} .. {max(lengths):.3f}) | "
            f"{forced:.3f} | {', '.join(f'{share:.3f}' for share in reached)} |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Accept length by architecture and objective, every seed a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for offset, objective in enumerate(OBJECTIVES):
        places, heights = [], []
        for place, architecture in enumerate(ARCHITECTURES):
            runs = [r for r in results if r["variant"][:2] == [architecture, objective]]
            places += [place + 0.3 * offset - 0.15] * len(runs)
            heights += [run["accept_length"] for run in runs]
        axis.scatter(places, heights, label=objective, alpha=0.8)
    axis.axhline(results[0]["prompt_lookup"], color="grey", linestyle=":", label="prompt lookup")
    axis.set_xticks(range(len(ARCHITECTURES)), list(ARCHITECTURES))
    axis.set_ylabel("accept length, held-out prompts")
    axis.legend()
    figure.savefig(file, dpi=110)


def write_report(results: list[dict[str, Any]], arguments: str, docs: Path) -> None:
    """Put table, plot and conditions between the markers of results.md."""
    one = results[0]
    seeds = 1 + max(result["variant"][2] for result in results)
    command = f"python bench/training/ablation.py {arguments} --steps {one['steps']} "
    command += f"--seeds {seeds} --new-tokens {one['new_tokens']}"
    plot(results, docs / "ablation.png")
    text = (
        f"{START}\n{table(results)}\n\n![accept length of every run](ablation.png)\n\n"
        f"{len(results)} runs of {one['steps']} steps, {one['batch'][0]} sequences x "
        f"{one['batch'][1]} anchors, block {one['block_size']}, on {one['sequences']} sequences "
        f"({one['tokens']} tokens); {sum(r['minutes'] for r in results):.0f} minutes on "
        f"{one['hardware']}, torch {one['torch']}. Accept length: true speculative decoding, "
        f"greedy, of {one['prompts']} held-out prompts, {one['new_tokens']} tokens; prompt lookup "
        f"reaches {one['prompt_lookup']:.3f} on them. Command: `{command}`\n{END}"
    )
    file = docs / "results.md"
    before, _, rest = file.read_text().partition(START)
    file.write_text(before + text + rest.partition(END)[2])


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
    output.mkdir(parents=True, exist_ok=True)
    if report is not None:
        given = " ".join([str(config), *(overrides or [])])
        write_report(read_results(output), given, report)
        return
    fixed = [f"run.steps={steps}", "run.max_minutes=null", f"run.output={output}"]
    parsed = load_config(config, [*(overrides or []), *fixed])
    started = time.monotonic()
    # Seeds outermost: whatever the time allows is a complete comparison.
    grid = [
        Variant(a, o, s) for s, a, o in itertools.product(range(seeds), ARCHITECTURES, OBJECTIVES)
    ]
    done = [result["variant"] for result in read_results(output)]
    target: Target | None = None
    for variant in grid:
        if variant.key() in done:
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            break
        if target is None:
            target = Trainer.load_target(parsed)
        result = run_variant(parsed, variant, target, output, new_tokens, rows)
        with (output / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
    print(table(read_results(output)))


if __name__ == "__main__":
    typer.run(main)
