"""The `dflare` command."""

from dflare.cli import convert, inspect
from dflare.cli.app import main

__all__ = ["convert", "inspect", "main"]
