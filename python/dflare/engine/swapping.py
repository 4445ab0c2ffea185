"""Attributes of an object that stand for others during a block of code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def swapped(owner: Any, **values: Any) -> Iterator[None]:
    """Give `owner` other values of existing attributes, and its own back afterwards."""
    replaced = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in replaced.items():
            setattr(owner, name, value)
