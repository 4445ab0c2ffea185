"""What the benchmarks of both operators do with a shape: check, time and report its arms."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from device import environment, measure_peaks
from measure import Arm, DeviceLostError, free_memory, profile, time_on_cpu, time_on_gpu
from results import report
from targets import Line, inaccurate


class Session:
    """One run of a script: what it measured the device to do, and what went wrong so far."""

    def __init__(self, op: str, arguments: argparse.Namespace) -> None:
        self.op = op
        self.arguments = arguments
        self.problems: list[str] = []
        if not arguments.profile:
            self.peaks = measure_peaks(arguments.device, getattr(torch, arguments.dtype))
            self.environment = environment(arguments.device)
            free_memory()

    def arms(
        self,
        arms: list[Arm],
        sets: int,
        named: dict[str, Any],
        refcheck: Callable[[list[Arm]], None],
    ) -> list[Line]:
        """Profiles the one arm, or checks, times and reports all of them.

        named: what the lines say of the shape. refcheck: gives the arms their errors. A baseline
        that is missing or fails is no problem of the run; dflare failing, or any result that is
        wrong, is.
        """
        if self.arguments.profile:
            if arms[0].failure:
                self.problems.append(f"{arms[0].name}: {arms[0].failure}")
            else:
                profile(arms[0])
            return []
        where = " ".join(f"{name} {value}" for name, value in named.items())
        if self.arguments.refcheck:
            try:
                refcheck([arm for arm in arms if not arm.failure])
            except DeviceLostError:
                raise
            except Exception as error:
                said = str(error).partition("\n")[0]
                self.problems.append(f"{where}: not checked, {type(error).__name__}: {said}")
        time = time_on_gpu if self.arguments.device == "cuda" else time_on_cpu
        time(arms, sets, self.arguments.rounds)
        lines = report(self.op, named, arms, self.peaks, self.environment)
        errors = {arm.name: arm.error for arm in arms}
        wrong = inaccurate(errors, self.arguments.dtype)
        wrong += [f"{arm.name}: {arm.failure}" for arm in arms if arm.failure and is_ours(arm)]
        self.problems += [f"{where}: {sentence}" for sentence in wrong]
        return lines

    def shape(self, label: str, run: Callable[[], object]) -> None:
        """Runs a shape; one whose buffers do not fit is skipped and says so.

        Raises:
            SystemExit: with status 1, the device is unusable: nothing after it could be measured.
        """
        try:
            run()
        except torch.OutOfMemoryError:
            print(f"skipped: {label} does not fit in memory", file=sys.stderr)
        except DeviceLostError as error:
            print(f"{label}: the device is lost {error}", file=sys.stderr)
            sys.exit(1)
        if "compile" in self.arguments.arms:
            torch._dynamo.reset()
        free_memory()

    def status(self) -> int:
        """Exit status, after a sentence on each problem."""
        for problem in self.problems:
            print(f"WRONG  {problem}", file=sys.stderr)
        return 1 if self.problems else 0


def is_ours(arm: Arm) -> bool:
    return arm.name in ("dflare", "schedule")
