"""Collects the sub-commands and turns our own errors into one line and exit status 1."""

import sys

import typer

from dflare.errors import DFlareError

app = typer.Typer(
    name="dflare",
    help="DFlare speculative decoding for SGLang.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; a DFlareError is the user's to mend, so no traceback."""
    try:
        app()
    except DFlareError as error:
        typer.echo(f"dflare: {error}", err=True)
        sys.exit(1)
