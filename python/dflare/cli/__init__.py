"""The `dflare` command."""

from dflare.cli import (
    convert,
    demo,
    doctor,
    draft_vocab,
    evaluate,
    inspect,
    serve,
    synth,
    train,
    verify,
)
from dflare.cli.app import main

__all__ = [
    "convert",
    "demo",
    "doctor",
    "draft_vocab",
    "evaluate",
    "inspect",
    "main",
    "serve",
    "synth",
    "train",
    "verify",
]
