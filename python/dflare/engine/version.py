"""Which SGLang versions this package was tested with, and the guard that holds users to them."""

import os
from importlib.metadata import PackageNotFoundError, version

from dflare.errors import UnsupportedError

TESTED_SGLANG_VERSIONS = ("0.5.23",)
OVERRIDE_ENV = "DFLARE_ALLOW_UNTESTED_SGLANG"


def installed_sglang_version() -> str | None:
    """Version of the installed SGLang, or None where there is none."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def check_sglang_version(found: str | None = None) -> None:
    """Refuse an SGLang that this package was not tested with.

    Args:
        found: the version to judge; the installed one by default.

    Raises:
        UnsupportedError: no SGLang, or an untested version while `DFLARE_ALLOW_UNTESTED_SGLANG`
            is not "1".
    """
    found = found or installed_sglang_version()
    tested = ", ".join(TESTED_SGLANG_VERSIONS)
    if found is None:
        raise UnsupportedError(
            f"SGLang is not installed; the engine needs sglang=={tested}: "
            f"pip install 'sglang=={TESTED_SGLANG_VERSIONS[-1]}'"
        )
    if found not in TESTED_SGLANG_VERSIONS and os.environ.get(OVERRIDE_ENV) != "1":
        raise UnsupportedError(
            f"found sglang {found}, but DFLARE was tested with {tested} only; install "
            f"'sglang=={TESTED_SGLANG_VERSIONS[-1]}', or set {OVERRIDE_ENV}=1 to try {found} "
            "at your own risk"
        )
