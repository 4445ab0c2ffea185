"""Collects the sub-commands and turns our own errors into one line and exit status 1."""

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError

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
    except ValidationError as error:  # of `options_of`
        for item in error.errors():
            option = f"--{item['loc'][0]}".replace("_", "-")
            typer.echo(f"dflare: {option} {item['input']}: {item['msg']}", err=True)
        sys.exit(1)


def options_of(settings: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a model, in place of its `**` parameter."""

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for name, field in settings.model_fields.items():
            option: Any = Annotated[field.annotation, typer.Option(help=field.description)]
            own.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=option
                )
            )
        setattr(command, "__signature__", signature.replace(parameters=own))  # noqa: B010
        return command

    return extend
