"""Real `sglang.Engine`s whose processes are forked instead of spawned, to start fast."""

import asyncio
import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil

_HERE = Path(__file__).parent
_TRACE = Path(tempfile.gettempdir()) / f"dflare-test-trace-{os.getpid()}.jsonl"
_WIDTHS = Path(tempfile.gettempdir()) / f"dflare-test-widths-{os.getpid()}.json"
_LOG = Path(tempfile.gettempdir()) / f"dflare-test-log-{os.getpid()}.txt"
# Widths take turns like this unless a test says otherwise: every change in the middle of requests.
TURNS = (3, 1, 8, 2, 1, 1, 5, 8, 8, 4)
# Context waits for its append most of the time, and the most that may wait is reached.
MOSTLY_PLAIN = (1,) * 20 + (4,)
# Every kind of arm: drafts, trees of them, a look-up alone, one that replaces drafts.
ALL_ARMS = (
    *(3, ("lookup", 5), ("tree", 12), ("spliced", 8), 1, 1, ("tree", 4), 1, ("lookup", 2)),
    *(8, ("tree", 16), ("tree", 7), ("spliced", 3), ("lookup", 8)),
)
_ready = False


def _prepare() -> None:
    """Start from a fork server that has SGLang imported, and let it outlive every engine."""
    global _ready
    if _ready:
        return
    os.environ["DFLARE_TEST_TRACE"] = str(_TRACE)
    os.environ["DFLARE_TEST_WIDTHS"] = str(_WIDTHS)
    os.environ["DFLARE_TEST_LOG"] = str(_LOG)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(_HERE), os.environ.get("PYTHONPATH")])
    )
    # Two processes with spinning OpenMP teams on few cores take many times as long as one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The fork server keeps the environment that it began with: what the CPU platform sets for
    # two tensor-parallel ranks must be there already.
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1" if (os.cpu_count() or 1) > 1 else "all"
    set_start_method = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda *_, **__: set_start_method("forkserver", force=True)
    set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["engine_preload"])
    import sglang.srt.entrypoints.engine as module

    module.kill_process_tree = _kill_engine_processes
    _ready = True


def _fail(*_args: Any) -> None:
    raise RuntimeError("a process of the engine died; its traceback is above")


def _kill_engine_processes(*_args: Any, **_kwargs: Any) -> None:
    # Not all children of this process: the schedulers of tests/cuda_path are some of them.
    children = psutil.Process(forkserver._forkserver._forkserver_pid).children(recursive=True)
    for child in children:
        child.kill()
    psutil.wait_procs(children)


def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    # Engines share a loop: SGLang's watch for SIGTERM, say, would go on in the next one's.
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


@contextmanager
def forked_engines(widths: Sequence[int] | str) -> Iterator[Path]:
    """Let the engines that a function of the package starts here be forked, with these widths.

    Yields:
        The file of what the package logs in their processes.
    """
    _prepare()
    _WIDTHS.write_text(json.dumps(widths))
    _LOG.write_text("")
    yield _LOG
    _end_tasks(asyncio.get_event_loop_policy().get_event_loop())


@contextmanager
def running_engine(
    target: Path | str,
    draft: Path | str | None = None,
    widths: Sequence[int | tuple[str, int]] | str = TURNS,
    **server_args: Any,
) -> Iterator[Any]:
    """A `sglang.Engine` of `target`, with DFLARE if there is a drafter.

    Args:
        widths: verify widths of successive decode steps, cyclic, cut to the block, of the drafter
            or with their proposer, `lookup` or `spliced`; or a value of `DFLARE_ADAPTIVE`.
    """
    _prepare()
    _WIDTHS.write_text(json.dumps(widths))
    import sglang

    arguments: dict[str, Any] = {
        "model_path": str(target),
        "log_level": "warning",
        # What answers are held against is computed in float32.
        "dtype": "float32",
        "max_total_tokens": 8192,
        # An idle scheduler would take a core from the reference that its answers are held against.
        "sleep_on_idle": True,
        # SGLang's own handler would kill the test run.
        "custom_sigquit_handler": _fail,
    }
    if draft is not None:
        arguments |= {
            "speculative_algorithm": "DFLARE",
            "speculative_draft_model_path": str(draft),
        }
    engine = sglang.Engine(**(arguments | server_args))
    try:
        yield engine
    finally:
        engine.shutdown()
        _end_tasks(engine.loop)


@contextmanager
def engine_that_may_end(*pair: Path, **arguments: Any) -> Iterator[Any]:
    """A `running_engine` whose end stops its event loop instead of killing the test run.

    SGLang's handler does all of its work but the killing, so that the last lines of the log and the
    time until the end can be seen.
    """
    from sglang.srt.managers import tokenizer_manager

    with running_engine(*pair, **arguments) as engine:
        kill = tokenizer_manager.kill_process_tree
        tokenizer_manager.kill_process_tree = lambda *_, **__: engine.loop.stop()
        try:
            yield engine
        finally:
            tokenizer_manager.kill_process_tree = kill
            logging.disable(logging.NOTSET)


def proposals(rid: str) -> list[dict[str, Any]]:
    """What the drafter proposed for a request: `prefix` (context length) and `block` a step."""
    lines = (json.loads(line) for line in _TRACE.read_text().splitlines())
    return [line for line in lines if line["rid"] == rid]
