"""The process from which schedulers are forked: device, stand-ins and SGLang are loaded once.

    python zygote.py SOCKET

It listens on a Unix socket. Each connection gets a child of its own, which answers requests of
the form (method, arguments) with (ok, value), or (error, traceback).
"""

import gc
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection, Listener
from pathlib import Path


def load() -> None:
    """Put the device below torch, and import everything that a scheduler needs."""
    tests = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(tests / "cuda_path"), str(tests / "engine"), str(tests)]
    import device  # noqa: F401 - before torch
    import stand_ins
    from cuda_device.own_kernels import load_kernels

    stand_ins.install()
    load_kernels()
    import in_process  # noqa: F401 - imports the scheduler
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.get_supported_archs()


def answer(connection: Connection) -> None:
    """Run in the child: serve one connection until it closes."""
    from in_process import InProcessScheduler

    scheduler = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if method == "start":
                scheduler = InProcessScheduler(**arguments)
                value = None
            else:
                value = getattr(scheduler, method)(**arguments)
            connection.send(("ok", value))
        except BaseException:
            connection.send(("error", traceback.format_exc()))


def _log_to(path: str) -> None:
    sys.stdout.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def main(address: str) -> None:
    load()
    # SGLang collects garbage before every capture: without what is there already.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    with Listener(address, family="AF_UNIX") as listener:
        while True:
            connection = listener.accept()
            if os.fork():
                connection.close()
                continue
            listener.close()
            # A child waits for children of its own.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _log_to(connection.recv())
            connection.send(os.getpid())
            answer(connection)
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
