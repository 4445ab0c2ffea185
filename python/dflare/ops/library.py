"""Loads libdflare_ops.so, which registers the operators under `torch.ops.dflare`."""

from pathlib import Path

import torch

from dflare.errors import DFlareError

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "libdflare_ops.so"
_BUILD_COMMAND = "pip install -e . --no-build-isolation (in the root of the repository)"


class OperatorLibraryError(DFlareError, ImportError):
    """The operator library is missing or does not fit the installed torch."""


def load_library(path: Path = LIBRARY_PATH) -> None:
    """Registers the operators of the library at `path` with torch.

    Raises:
        OperatorLibraryError: the file is missing, or was built for another torch.
    """
    if not path.is_file():
        raise OperatorLibraryError(
            f"the operator library {path} does not exist; build it with: {_BUILD_COMMAND}"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise OperatorLibraryError(
            f"the operator library {path} does not load in torch {torch.__version__} ({error}); "
            f"it was likely built for another torch: rebuild it with: {_BUILD_COMMAND}"
        ) from error
