"""A step that fails: its request is ended and the server goes on, or it ends and says why.

SGLang 0.5.23 ends the server on any exception in its scheduler. Here an exception in a forward pass
gives back what the batch holds, as SGLang's own `pause_generation(mode="retract")` does before a
change of weights, and every request of the batch is tried again alone; one that fails alone is
aborted with status 500 and the reason. That needs one rank, no overlap scheduling and a device that
still works. Otherwise the server ends, and its last line names the requests and the cause.
"""

import logging
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from dflare.engine.request_guard import is_active

logger = logging.getLogger(__name__)

# So many requests that fail alone, and none that ends well between: then it is not they who are
# wrong.
_FAILURES = 3
_GIVE_UP = (torch.AcceleratorError, torch.OutOfMemoryError, MemoryError)


class _Failed:
    """Stands for the result of a step that raised."""

    def __init__(self, error: Exception) -> None:
        self.error = error


# --- in the scheduler's process -------------------------------------------------------------------


def _run_batch(original, scheduler, batch, *args, **kwargs):
    try:
        return original(scheduler, batch, *args, **kwargs)
    except Exception as error:
        if not is_active():
            raise
        if _can_go_on(scheduler, error):
            return _Failed(error)
        _leave_cause(batch, error)
        raise


def _process_batch_result(original, scheduler, batch, result, *args, **kwargs):
    if isinstance(result, _Failed):
        return _give_back(scheduler, batch, result.error)
    try:
        done = original(scheduler, batch, result, *args, **kwargs)
    except Exception as error:
        if is_active():
            _leave_cause(batch, error)
        raise
    if getattr(scheduler, "dflare_failures", 0) and any(req.finished() for req in batch.reqs):
        scheduler.dflare_failures = 0
    return done


def _can_go_on(scheduler: Any, error: Exception) -> bool:
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return (
        not isinstance(error, _GIVE_UP)
        # Other ranks would wait for this one in the middle of the step.
        and (parallel.tp_size, parallel.pp_size, parallel.dp_size) == (1, 1, 1)
        # The next step has been planned on the result of this one.
        and not scheduler.enable_overlap
        and scheduler.disaggregation_mode == DisaggregationMode.NULL
        and getattr(scheduler, "dflare_failures", 0) < _FAILURES
    )


def _give_back(scheduler: Any, batch: Any, error: Exception) -> None:
    """Return the batch's slots and queue its requests again; end the one that failed alone."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    requests = list(batch.reqs)
    rids = [request.rid for request in requests]
    logger.error("DFLARE: a step of %s failed", ", ".join(rids), exc_info=error)
    # A prefill was about to become the last batch, from which SGLang fills the running one; what
    # was the last batch is in the running one by now.
    scheduler.last_batch = batch if batch.forward_mode.is_extend() else None
    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
    scheduler.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
    batch.reqs = []
    if len(requests) > 1:
        scheduler.dflare_suspects = getattr(scheduler, "dflare_suspects", set()) | set(rids)
        return
    scheduler.dflare_failures = getattr(scheduler, "dflare_failures", 0) + 1
    for request in requests:
        _abort(scheduler, request, f"the server failed on this request: {_describe(error)}")


def _abort(scheduler: Any, request: Any, reason: str) -> None:
    """End a request that waits in the queue, as SGLang does for its clients."""
    from sglang.srt.managers.scheduler import _make_abort_req

    scheduler.waiting_queue = [other for other in scheduler.waiting_queue if other is not request]
    scheduler._release_aborted_request(request)
    finished = {"type": "abort", "status_code": 500, "message": reason}
    scheduler.send_abort_output(_make_abort_req(request, finished_reason=finished), request)


def _get_num_allocatable_reqs(original, scheduler, running_bs, *args, **kwargs):
    """One request at a time while any is there that was in a failed step with others."""
    allowed = original(scheduler, running_bs, *args, **kwargs)
    suspects = getattr(scheduler, "dflare_suspects", None)
    if suspects:
        running = scheduler.running_batch.reqs
        suspects &= {request.rid for request in (*scheduler.waiting_queue, *running)}
        if suspects:
            return min(allowed, 0 if running_bs else 1)
    return allowed


def _leave_cause(batch: Any, error: Exception) -> None:
    """Tell the server's first process, which has the last word, why this one ends."""
    rids = ", ".join(request.rid for request in batch.reqs)
    server = multiprocessing.parent_process()
    file = _cause_file(server.pid if server is not None and server.pid else os.getpid())
    try:
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(f"a step of {rids} failed: {_describe(error)}")
    except OSError as problem:
        logger.error("DFLARE: %s cannot be written (%s)", file, problem)


# --- in the server's first process ----------------------------------------------------------------


def _end(original, handler, *args, **kwargs):
    """As SGLang's, with a last line that says why."""
    if not is_active():
        return original(handler, *args, **kwargs)
    manager = handler.tokenizer_manager
    watchdog = manager._subprocess_watchdog
    cause = _read_cause() or _dead_processes(watchdog) or "a process of it failed, see above"
    if watchdog is not None:
        watchdog.stop()
    manager.dump_requests_before_crash()
    logger.error("DFLARE: the server ends: %s", cause)
    logging.disable()
    return original(handler, *args, **kwargs)


def _read_cause() -> str:
    file = _cause_file(os.getpid())
    try:
        if file.stat().st_uid != os.getuid():
            return ""
        cause = file.read_text()
        file.unlink()
    except OSError:
        return ""
    return cause


def _dead_processes(watchdog: Any) -> str:
    if watchdog is None:
        return ""
    return ", ".join(
        f"process {name} ({process.pid}) ended with exit code {process.exitcode}"
        for process, name in zip(watchdog._processes, watchdog._names, strict=True)
        if not process.is_alive()
    )


def _cause_file(server: int) -> Path:
    return Path(tempfile.gettempdir()) / f"dflare-{server}.cause"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


# (SGLang's function below sglang.srt, the hook around it, the function's parameters)
FAILED_STEP_HOOKS = (
    ("managers.scheduler.Scheduler.run_batch", _run_batch, "self batch pp_proxy_tensors"),
    (
        "managers.scheduler.Scheduler.process_batch_result",
        _process_batch_result,
        "self batch result",
    ),
    (
        "managers.scheduler.Scheduler.get_num_allocatable_reqs",
        _get_num_allocatable_reqs,
        "self running_bs beam_width running_batch num_held_rows",
    ),
    (
        "managers.tokenizer_manager.SignalHandler.running_phase_sigquit_handler",
        _end,
        "self signum frame",
    ),
)
