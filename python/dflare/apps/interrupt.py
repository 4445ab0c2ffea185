"""Ctrl-C while an engine starts or runs in this process: the end, without tracebacks."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 128 + signal.SIGINT


@contextmanager
def ends_quietly_at_ctrl_c() -> Iterator[None]:
    """End this process and all that it started, with status 130, at the first SIGINT.

    A terminal sends SIGINT to every process of an engine, and each would print a traceback of its
    own, the first of them in the middle of an import. So the signal is blocked, which processes
    started meanwhile inherit, and one thread waits for it. To be entered by the main thread.
    """
    done = threading.Event()

    def wait() -> None:
        signal.sigwait({signal.SIGINT})
        if not done.is_set():
            _end_children()
            sys.stderr.write("\x1b[?25h\n" if sys.stderr.isatty() else "")  # the cursor back
            sys.stderr.flush()
            os._exit(STATUS)

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    watcher = threading.Thread(target=wait, name="ctrl-c", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        assert watcher.ident is not None
        signal.pthread_kill(watcher.ident, signal.SIGINT)
        watcher.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _end_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
