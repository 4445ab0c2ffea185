"""setuptools' build backend, which asks for torch only where the environment has none.

The build reads torch's headers. An isolated build would download torch and its CUDA libraries a
second time, gigabytes of them, beside the torch that the package is installed for.
"""

from build_toolkit import find_torch
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

TORCH = "torch>=2.11,<2.15"


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]


def _torch() -> list[str]:
    return [] if find_torch() else [TORCH]
