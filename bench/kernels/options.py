"""Command-line options that the benchmarks of both operators share."""

import argparse
import sys
from collections.abc import Sequence

from models import PAIRS

DTYPES = {"cuda": ("bfloat16", "float16"), "cpu": ("float32", "bfloat16")}


def add_options(parser: argparse.ArgumentParser, arms: Sequence[str]) -> None:
    """arms: names of all arms that the script has."""
    parser.add_argument("--device", choices=DTYPES, default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--model", choices=PAIRS, nargs="+", default=["qwen3-4b"])
    parser.add_argument("--arms", choices=arms, nargs="+", default=list(arms), help="only these")
    parser.add_argument("--without", choices=arms, nargs="+", default=[], help="all but these")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--refcheck", action="store_true", help="errors against float64; status 1")
    parser.add_argument("--profile", choices=arms, help="one call of one arm, no timing")


def check_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exits with a message where options do not go together; leaves the chosen arms in `arms`."""
    if arguments.dtype not in DTYPES[arguments.device]:
        known = " and ".join(DTYPES[arguments.device])
        parser.error(
            f"--dtype {arguments.dtype}: the {arguments.device} operators take {known}; choose one "
            "with --dtype"
        )
    if arguments.profile and arguments.device == "cpu":
        parser.error("--profile marks one call for ncu: it needs --device cuda")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: expected at least 1")
    wanted = [arguments.profile] if arguments.profile else arguments.arms
    arguments.arms = [arm for arm in dict.fromkeys(wanted) if arm not in arguments.without]
    leave_out(parser, arguments, [], "")


def leave_out(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, arms: Sequence[str], why: str
) -> None:
    """Takes these arms from those to measure and says so; exits if none is left."""
    dropped = [arm for arm in arguments.arms if arm in arms]
    arguments.arms = [arm for arm in arguments.arms if arm not in arms]
    if dropped:
        print(f"{', '.join(dropped)} left out: {why}", file=sys.stderr)
    if not arguments.arms:
        parser.error("--arms, --without and --device leave no arm to measure")
