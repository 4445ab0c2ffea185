"""The `dflare` command."""

from dflare.cli.app import main

__all__ = ["main"]
