"""The adaptive arm against the best other arm, without the luck that made that arm look best.

The best of several noisy medians is partly the luckiest: an arm exactly as good as all others would
be held to be worse than it. Here the best arm of a load is named by all repeats but one, and the
ratio is taken in that one, in turn.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import mean, stdev

from bench.serving.plan import Sweep
from bench.serving.records import throughput_by_load
from bench.serving.sweep_plot import Record


def held_out_ratios(sweep: Sweep, records: Iterable[Record]) -> dict[int, list[float]]:
    """Throughput of the adaptive arm over that of the arm that was best in the other repeats.

    Returns:
        By concurrency, one ratio for each dataset and repeat that all arms were measured in; empty
        with less than two repeats.
    """
    ratios: dict[int, list[float]] = defaultdict(list)
    for (_, concurrency), by_arm in throughput_by_load(records).items():
        ours, theirs = by_arm[sweep.adaptive or ""], [by_arm[name] for name in sweep.rivals]
        repeats = set(ours).intersection(*theirs)
        for held_out in sorted(repeats) if theirs and len(repeats) > 1 else ():
            best = max(theirs, key=lambda arm: mean(arm[i] for i in repeats - {held_out}))
            ratios[concurrency].append(ours[held_out] / best[held_out])
    return dict(ratios)


def held_out_table(sweep: Sweep, records: Iterable[Record]) -> list[str]:
    """The ratios as a section of the report."""
    ratios = held_out_ratios(sweep, records)
    if not ratios:
        return []
    rows = {str(concurrency): values for concurrency, values in sorted(ratios.items())}
    rows["all"] = [ratio for values in ratios.values() for ratio in values]
    lines = [f"| {name} | {_mean_and_error(row)} | {len(row)} |" for name, row in rows.items()]
    return [
        "## Adaptive against the arm that was best in the other repeats",
        "",
        "| concurrency | adaptive / best, geometric mean | standard error | ratios |",
        "|---|---|---|---|",
        *lines,
        "",
        "Best by medians over all repeats, as below, is partly luck; this is not.",
        "",
    ]


def _mean_and_error(ratios: list[float]) -> str:
    logs = [math.log(ratio) for ratio in ratios]
    middle = math.exp(mean(logs))
    error = f"{middle * stdev(logs) / math.sqrt(len(logs)):.3f}" if len(logs) > 1 else "–"
    return f"{middle:.3f} | {error}"
