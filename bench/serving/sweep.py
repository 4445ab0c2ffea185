"""Benchmark arms of speculation under concurrent load, on real servers.

    python -m bench.serving.sweep bench/serving/sweeps/quick.yaml --out runs/quick

The plan is a YAML file (see plan.py). Every cell - one arm, one dataset, one concurrency, one
repeat - is one JSON line in `<out>/cells.jsonl`; a sweep that was interrupted goes on where it
stopped, and tries again what failed. `<out>/report.md` holds the table, the plots lie beside it;
both are written however the sweep ends. The last line printed tells where the adaptive arm does
worst against the best of no speculation and every fixed width; exit status 0 only if all of these
were measured.
"""

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.serving.client import measure
from bench.serving.fleet import Fleet, reason_of
from bench.serving.plan import Cell, Sweep, cell_of, cells, read_records
from bench.serving.provenance import provenance
from bench.serving.report import is_whole, missing_cells, name_of, write_report

QUICK = Path(__file__).parent / "sweeps" / "quick.yaml"


def run(sweep: Sweep, fleet: Fleet, out: Path, records: list[dict[str, Any]]) -> int:
    """Measure the cells that are still missing and that the plan's time holds.

    Args:
        sweep, fleet: The plan and its servers.
        out: Folder of `cells.jsonl`.
        records: What was measured before; every cell is added as soon as it is done, one that
            failed with `failed`, the reason, in place of its figures.

    Returns:
        How many of the last repeats were not begun, for want of time.
    """
    started, path = time.monotonic(), out / "cells.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = {cell_of(record) for record in records}
    missing = [cell for cell in cells(sweep) if cell not in done]
    common = {"simulated": sweep.simulate_acc_len, "made_with": provenance()}
    if sweep.keep_alive:  # no cell is measured beside a server that starts
        for name in dict.fromkeys(cell.arm for cell in missing):
            fleet.get(name)
    last = max((cell.repeat for cell in done), default=0)
    with path.open("a") as file:
        for number, cell in enumerate(in_time(missing, started, sweep.minutes), start=1):
            last = max(last, cell.repeat)
            if (server := fleet.get(cell.arm)) is None:
                continue
            try:
                record = measure(sweep, cell, server, out)
                fleet.worked(cell.arm)
            except Exception as error:  # the generator raises whatever its libraries do
                record = cell.model_dump() | {"failed": reason_of(error)}
                fleet.failed(cell.arm, record["failed"])
            records.append(record | common)
            file.write(json.dumps(records[-1]) + "\n")
            file.flush()
            print(f"[{number}/{len(missing)}] {_line(cell, records[-1])}", flush=True)
    return sweep.repeats - 1 - last


def in_time(missing: Iterable[Cell], started: float, minutes: float | None) -> Iterator[Cell]:
    """The cells of the first repeat, and of the others as many as end within so many minutes.

    A repeat is expected to take as long as the longest before it.
    """
    longest = 0.0
    for _, repeat in groupby(missing, key=lambda cell: cell.repeat):
        begun = time.monotonic()
        if minutes and longest and begun + longest > started + 60 * minutes:
            return
        yield from repeat
        longest = max(longest, time.monotonic() - begun)


def _line(cell: Cell, record: dict[str, Any]) -> str:
    what = ("SIMULATED acceptance, " if record["simulated"] else "") + name_of(cell)
    if "failed" in record:
        return f"{what}: FAILED, {record['failed']}"
    accept, errors = record["accept_length"], record["errors"]
    return (
        f"{what}: {record['output_tok_s']:.1f} tok/s"
        + (f", accept length {accept:.2f}" if accept else "")
        + (f", {errors} ERRORS" if errors else "")
    )


def parse(argv: list[str]) -> tuple[Sweep, Path]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("plan", type=Path, nargs="?", help="YAML plan")
    parser.add_argument("--quick", action="store_true", help=f"the plan {QUICK.name}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--concurrency", type=int, nargs="+", help="instead of the plan's")
    parser.add_argument("--arms", nargs="+", help="some of the plan's arms")
    parser.add_argument("--datasets", nargs="+", help="some of the plan's datasets")
    parser.add_argument("--repeats", type=int, help="instead of the plan's")
    parser.add_argument("--model", help="target, instead of the plan's")
    parser.add_argument("--draft", help="drafter, instead of the plan's; --model has its own")
    parser.add_argument(
        "--simulate-acc-len",
        type=float,
        help="fake this accept length; a --model without --draft then gets a random drafter",
    )
    args = parser.parse_args(argv)
    if args.quick == bool(args.plan):
        parser.error("give one plan, or --quick")
    sweep = Sweep.load(QUICK if args.quick else args.plan)
    named = ("concurrency", "repeats", "model", "draft", "simulate_acc_len")
    changes = {name: getattr(args, name) for name in named if getattr(args, name) is not None}
    if args.model and not args.draft:
        changes["draft"] = None  # the plan's belongs to the plan's target
    for name in ("arms", "datasets"):
        if wanted := getattr(args, name):
            known = {item.name: item for item in getattr(sweep, name)}
            if unknown := [item for item in wanted if item not in known]:
                parser.error(f"unknown {name} {unknown}; the plan has {list(known)}")
            changes[name] = [known[item] for item in wanted]
    try:
        return Sweep.model_validate(sweep.model_dump() | changes), args.out
    except ValidationError as error:
        parser.error("; ".join(item["msg"] for item in error.errors()))


def holds(plan_file: Path, sweep: Sweep) -> bool:
    """Whether a file holds this plan; what an older one lacks has its default."""
    try:
        return Sweep.model_validate_json(plan_file.read_text()) == sweep
    except ValidationError:
        return False


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    # An interrupted sweep takes its servers with it and still writes its report.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sweep, out = parse(argv)
    out.mkdir(parents=True, exist_ok=True)
    plan_file = out / "plan.json"
    if plan_file.exists() and not holds(plan_file, sweep):
        raise SystemExit(
            f"{plan_file} holds another plan than this one; choose another --out, or remove it"
        )
    plan_file.write_text(sweep.model_dump_json(indent=1))
    records = [record for record in read_records(out / "cells.jsonl") if is_whole(record)]
    fleet = Fleet(sweep, out)
    late = 0
    try:
        late = run(sweep, fleet, out, records)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", flush=True)
    finally:
        fleet.stop()
        gaps = dict(fleet.given_up)
        if late:
            gaps["repeats"] = (
                f"{late} of {sweep.repeats} would not have ended within {sweep.minutes:g} minutes"
            )
            print(f"left out: {gaps['repeats']}; the same command goes on", flush=True)
            sweep = sweep.model_copy(update={"repeats": sweep.repeats - late})
        command = f"python -m bench.serving.sweep {shlex.join(argv)}"
        print(write_report(sweep, records, gaps, command, out))
    sys.exit(bool(missing_cells(sweep, records)))


if __name__ == "__main__":
    main()
