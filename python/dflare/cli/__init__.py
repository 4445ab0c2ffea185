"""The `dflare` command."""

from dflare.cli import convert, evaluate, inspect, synth, train
from dflare.cli.app import main

__all__ = ["convert", "evaluate", "inspect", "main", "synth", "train"]
