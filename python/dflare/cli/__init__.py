"""The `dflare` command."""

from dflare.cli import convert, doctor, inspect, serve, verify
from dflare.cli.app import main

__all__ = ["convert", "doctor", "inspect", "main", "serve", "verify"]
