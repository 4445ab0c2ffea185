"""The `dflare` command."""

from dflare.cli import convert, doctor, evaluate, inspect, serve, synth, train, verify
from dflare.cli.app import main

__all__ = [
    "convert",
    "doctor",
    "evaluate",
    "inspect",
    "main",
    "serve",
    "synth",
    "train",
    "verify",
]
