"""The `dflare` command."""

from dflare.cli import commands as commands
from dflare.cli.app import main as main
