"""A folder that an environment variable names for a server to write to."""

import os
from pathlib import Path

from dflare.errors import UnsupportedError


def named_folder(variable: str, purpose: str) -> Path | None:
    """The folder, made if it is not there; None where the variable is not set.

    Args:
        variable: Its name.
        purpose: What the folder is for, for the error.

    Raises:
        UnsupportedError: It cannot be written to.
    """
    name = os.environ.get(variable)
    if not name:
        return None
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        if not os.access(name, os.W_OK):
            raise PermissionError("no permission to write there")
    except OSError as error:
        raise UnsupportedError(
            f"{variable}={name!r} ({error}); expected a folder {purpose}, or no such variable"
        ) from error
    return Path(name)
