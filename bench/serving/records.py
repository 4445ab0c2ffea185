"""The records of a sweep's cells, gathered by what is compared."""

from collections import defaultdict
from collections.abc import Iterable

from bench.serving.sweep_plot import Record


def measured(records: Iterable[Record]) -> list[Record]:
    """The records of cells that did not fail."""
    return [record for record in records if "failed" not in record]


def throughput_by_load(
    records: Iterable[Record],
) -> dict[tuple[str, int], dict[str, dict[int, float]]]:
    """Output tokens per second by (dataset, concurrency), then by arm, then by repeat.

    An arm without a measurement at a load has no repeats there.
    """
    rates: dict[tuple[str, int], dict[str, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for r in measured(records):
        rates[r["dataset"], r["concurrency"]][r["arm"]][r["repeat"]] = r["output_tok_s"]
    return rates
