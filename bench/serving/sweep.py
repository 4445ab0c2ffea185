"""Benchmark arms of speculation under concurrent load, on real servers.

    python bench/serving/sweep.py bench/serving/sweeps/quick.yaml --out runs/quick

The plan is a YAML file (see plan.py). Every cell - one arm, one dataset, one concurrency, one
repeat - is one JSON line in `<out>/cells.jsonl`; a sweep that was interrupted goes on where it
stopped. `<out>/report.md` holds the table, the plots lie beside it. The last line printed tells
where the adaptive arm does worst against the best of no speculation and every fixed width.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from plan import Arm, Cell, Sweep, cell_of, cells, read_records
from report import write_report
from server import Server

from dflare.errors import DFlareError

QUICK = Path(__file__).parent / "sweeps" / "quick.yaml"


class Fleet:
    """The servers of a sweep: all at once, or one at a time."""

    def __init__(self, sweep: Sweep, out: Path):
        self._sweep = sweep
        self._out = out
        self._running: dict[str, Server] = {}
        self.failed: dict[str, str] = {}

    def get(self, name: str) -> Server | None:
        """The running server of an arm, started if need be; None for an optional arm that fails."""
        if name in self.failed:
            return None
        if name not in self._running:
            if not self._sweep.keep_alive:
                self.stop()
            arm = next(arm for arm in self._sweep.arms if arm.name == name)
            print(f"starting {name}", flush=True)
            try:
                server = Server(self._flags(arm), self._out / f"{name}.log", self._env(arm))
            except DFlareError as error:
                if not arm.optional:
                    raise
                self.failed[name] = str(error).splitlines()[-1]
                print(f"{name} does not run here: {self.failed[name]}", flush=True)
                return None
            self._running[name] = server
        return self._running[name]

    def stop(self) -> None:
        for server in self._running.values():
            server.stop()
        self._running.clear()

    def _flags(self, arm: Arm) -> list[str]:
        target, draft = self._sweep.pair()
        flags = ["--model-path", target, *self._sweep.server_args]
        # A server that waits must not take the processor from the one that is measured.
        flags += ["--sleep-on-idle"] if self._sweep.keep_alive else []
        return flags + [arg.format(draft=draft) for arg in arm.args]

    def _env(self, arm: Arm) -> dict[str, str]:
        simulated = self._sweep.simulate_acc_len
        return arm.env | ({"SGLANG_SIMULATE_ACC_LEN": str(simulated)} if simulated else {})


def run(sweep: Sweep, out: Path) -> list[dict[str, Any]]:
    """Measure the cells that are still missing; return all records."""
    from client import measure

    path = out / "cells.jsonl"
    records = read_records(path)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = {cell_of(record) for record in records}
    missing = [cell for cell in cells(sweep) if cell not in done]
    datasets = {dataset.name: dataset for dataset in sweep.datasets}
    fleet = Fleet(sweep, out)
    with ExitStack() as stack, path.open("a") as file:
        stack.callback(fleet.stop)
        if sweep.keep_alive:  # no cell is measured beside a server that starts
            for name in dict.fromkeys(cell.arm for cell in missing):
                fleet.get(name)
        for number, cell in enumerate(missing, start=1):
            server = fleet.get(cell.arm)
            if server is None:
                continue
            record = measure(sweep, datasets[cell.dataset], cell, server, out)
            record["simulated"] = sweep.simulate_acc_len
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(_line(cell, record, number, len(missing)), flush=True)
    return records


def _line(cell: Cell, record: dict[str, Any], number: int, total: int) -> str:
    accept = record["accept_length"]
    return (
        f"[{number}/{total}] {cell.dataset}, {cell.concurrency} in flight, {cell.arm}: "
        f"{record['output_tok_s']:.1f} tok/s"
        + (f", accept length {accept:.2f}" if accept else "")
        + (f", {record['errors']} ERRORS" if record["errors"] else "")
    )


def describe(command: Iterable[str]) -> dict[str, Any]:
    """What the figures were measured with."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    packages = ("sglang", "torch", "sglang-dflare", "sglang-kernel")
    revision = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "command": " ".join(command),
        "device": device,
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "python": platform.python_version(),
        "revision": revision or "unknown",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""
    )
    return f"{model or platform.processor()}, {os.cpu_count()} logical cores"


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
    parser.add_argument("--draft", help="drafter, instead of the plan's")
    parser.add_argument("--simulate-acc-len", type=float, help="fake this accept length")
    args = parser.parse_args(argv)
    if args.quick == bool(args.plan):
        parser.error("give one plan, or --quick")
    sweep = Sweep.load(QUICK if args.quick else args.plan)
    named = ("concurrency", "repeats", "model", "draft", "simulate_acc_len")
    changes = {name: getattr(args, name) for name in named if getattr(args, name) is not None}
    for name in ("arms", "datasets"):
        if wanted := getattr(args, name):
            known = {item.name: item for item in getattr(sweep, name)}
            if unknown := [item for item in wanted if item not in known]:
                parser.error(f"unknown {name} {unknown}; the plan has {list(known)}")
            changes[name] = [known[item] for item in wanted]
    return Sweep.model_validate(sweep.model_dump() | changes), args.out


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    # An interrupted sweep must take its servers with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sweep, out = parse(argv)
    out.mkdir(parents=True, exist_ok=True)
    plan_file = out / "plan.json"
    plan = sweep.model_dump_json(indent=1)
    if plan_file.exists() and plan_file.read_text() != plan:
        raise SystemExit(
            f"{plan_file} holds another plan than this one; choose another --out, or remove it"
        )
    plan_file.write_text(plan)
    records = run(sweep, out)
    about = describe(["python bench/serving/sweep.py", *argv])
    print(write_report(sweep, records, about, out))


if __name__ == "__main__":
    main()
