"""The `dflare` command."""

from dflare.cli import convert, demo, doctor, evaluate, inspect, serve, synth, train, verify
from dflare.cli.app import main

__all__ = [
    "convert",
    "demo",
    "doctor",
    "evaluate",
    "inspect",
    "main",
    "serve",
    "synth",
    "train",
    "verify",
]
