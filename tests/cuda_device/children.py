"""Processes for tests that lose the device."""

import os
from collections.abc import Callable


def in_child(function: Callable[[], None]) -> None:
    """Runs it in a process of its own: a failed device stays failed."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as error:
            print(repr(error))
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
