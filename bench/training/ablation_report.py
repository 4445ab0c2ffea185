"""Results of the ablation as a table, a plot and a section of docs/results.md."""

import itertools
import statistics
from pathlib import Path
from typing import Any

START, END = "<!-- ablation -->", "<!-- /ablation -->"
_SLOTS = 3  # of which the table shows how often they are reached


def _of(results: list[dict[str, Any]], architecture: str, objective: str) -> list[dict[str, Any]]:
    return [run for run in results if run["variant"][:2] == [architecture, objective]]


def _names(results: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    conditions = results[0]["conditions"]
    return list(conditions["architectures"]), list(conditions["objectives"])


def table(results: list[dict[str, Any]]) -> str:
    """One row an architecture and objective: mean over seeds, with the range."""
    slots = range(min(_SLOTS, len(results[0]["reached"])))
    lines = [
        "| architecture | objective | parameters | seeds | accept length, mean (min .. max) | "
        f"teacher-forced | share accepted to slot {', '.join(str(slot + 1) for slot in slots)} |",
        "|---|---|---|---|---|---|---|",
    ]
    for architecture, objective in itertools.product(*_names(results)):
        runs = _of(results, architecture, objective)
        if not runs:
            continue
        lengths = [run["accept_length"] for run in runs]
        forced = statistics.mean(run["teacher_forced"] for run in runs)
        reached = [statistics.mean(run["reached"][slot] for run in runs) for slot in slots]
        lines.append(
            f"| {architecture} | {objective} | {runs[0]['parameters'] / 1e6:.2f}M | {len(runs)} | "
            f"**{statistics.mean(lengths):.3f}** ({min(lengths):.3f} .. {max(lengths):.3f}) | "
            f"{forced:.3f} | {', '.join(f'{share:.3f}' for share in reached)} |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Accept length by architecture and objective, every seed a dot."""
    from matplotlib.figure import Figure

    architectures, objectives = _names(results)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for offset, objective in enumerate(objectives):
        places, heights = [], []
        for place, architecture in enumerate(architectures):
            runs = _of(results, architecture, objective)
            places += [place + 0.3 * offset - 0.15] * len(runs)
            heights += [run["accept_length"] for run in runs]
        axis.scatter(places, heights, label=objective, alpha=0.8)
    lookup = statistics.mean(run["prompt_lookup"] for run in results)
    axis.axhline(lookup, color="grey", linestyle=":", label="prompt lookup")
    axis.set_xticks(range(len(architectures)), architectures)
    axis.set_ylabel("accept length, held-out prompts")
    axis.legend()
    figure.savefig(file, dpi=110)


def _objective(name: str, settings: dict[str, Any]) -> str:
    """Name the settings of an objective that decide what it computes."""
    if settings["name"] == "dpace":
        return f"{name}: alpha {settings['alpha']}"
    growing = settings["gamma_end"] is not None
    end = f" growing to {settings['gamma_end']}" if growing else ", fixed"
    return f"{name}: gamma {settings['gamma']}{end}"


def conditions_text(results: list[dict[str, Any]]) -> str:
    """Say what all runs share, above all what sets them apart from the methods' own papers."""
    conditions = results[0]["conditions"]
    drafter, data, shared = conditions["drafter"], conditions["data"], conditions["objective"]
    objectives = "; ".join(_objective(*item) for item in conditions["objectives"].items())
    soft = shared["soft_labels"]
    labels = "labels are the target's tokens alone (soft labels 0)"
    if soft:
        labels = (
            f"soft labels {soft}: that share of every label is the target's distribution, in all "
            "variants, so DFlash with decay here is not the published one, which learns tokens "
            "alone"
        )
    vocabulary = "loss over the whole vocabulary"
    if shared["frequent"]:
        vocabulary = f"loss over {shared['frequent']} frequent and {shared['random']} random tokens"
    start = "the target's own layers" if drafter["init"] == "target" else "random weights"
    return (
        f"Objectives: {objectives}; {labels}; {vocabulary}. {drafter['layers']} layers, block "
        f"{drafter['block_size']}, {data['batch_size']} sequences x {data['anchors']} anchors a "
        f"step, learning rate {conditions['optimizer']['learning_rate']}, started from {start}, "
        f"products in {conditions['run']['products']}."
    )


def _each(results: list[dict[str, Any]], key: str) -> list[str]:
    """The different values of a field, in the order of the runs."""
    return list(dict.fromkeys(str(run[key]) for run in results))


def write_report(results: list[dict[str, Any]], docs: Path) -> None:
    """Put table, plot and conditions between the markers of results.md.

    Args:
        results: Runs under one set of conditions, at least one.
        docs: Folder of results.md; the plot goes beside it.
    """
    one, conditions = results[0], results[0]["conditions"]
    plot(results, docs / "ablation.png")
    lookup = statistics.mean(run["prompt_lookup"] for run in results)
    text = (
        f"{START}\n{table(results)}\n\n![accept length of every run](ablation.png)\n\n"
        f"{conditions_text(results)}\n\n"
        f"{len(results)} runs of {conditions['run']['steps']} steps on {one['sequences']} "
        f"sequences ({one['tokens']} tokens, fingerprint {conditions['corpus']}); "
        f"{sum(run['minutes'] for run in results):.0f} minutes on "
        f"{' and '.join(_each(results, 'hardware'))}, torch "
        f"{' and '.join(_each(results, 'torch'))}. Accept length: true speculative decoding, "
        f"greedy, of {one['prompts']} held-out prompts, {conditions['new_tokens']} tokens; prompt "
        f"lookup reaches {lookup:.3f} on their answers. Command: "
        f"{', then '.join(f'`{command}`' for command in _each(results, 'command'))}\n{END}"
    )
    file = docs / "results.md"
    before, _, rest = file.read_text(encoding="utf-8").partition(START)
    file.write_text(before + text + rest.partition(END)[2], encoding="utf-8")
