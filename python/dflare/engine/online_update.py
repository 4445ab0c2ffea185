"""Online weight updates: from disk for target or drafter, by tensors for the target only.

SGLang offers every tensor of an update to all the runners that its selector names. The names of a
target's layers are a drafter's too ("layers.0.self_attn.q_proj.weight"), so nothing in an update
says whose it is; it is the target's. Of a folder its config.json says whose it is.
"""

import logging
from typing import Any

import torch
from sglang.srt.runtime_context import get_context, get_spec
from torch import distributed

from dflare.checkpoint import check_finite, is_drafter, load_tensors, read_config
from dflare.engine.names import ALGORITHM
from dflare.errors import CheckpointError, DFlareError, UnsupportedError

logger = logging.getLogger(__name__)

_REFUSAL = (
    "DFLARE does not update a drafter by tensors: they cannot be told from the target's. Send the "
    'update with selector "target" or "all", and another drafter by `dflare swap`'
)


class _RefusingRunner:
    """Stands for the drafter's runner; it is its own weight updater."""

    @property
    def weight_updater(self) -> "_RefusingRunner":
        return self

    def begin_weight_update(self) -> None:
        """Nothing to prepare."""

    def end_weight_update(self, *, run_post_load: bool) -> None:
        """Nothing to finish."""

    def update_weights_from_tensor(self, **_: Any) -> tuple[bool, str]:
        return False, _REFUSAL

    def load_weights_from_distributed(self, *_: Any) -> tuple[bool, str]:
        return False, _REFUSAL

    def check_weights(self, **_: Any) -> None:
        """No checksums: they are compared with those of an update."""


def runners_to_update(original: Any, updater: Any, selector: str = "all") -> list[tuple[str, Any]]:
    """Hook on SGLang's choice of the runners that an update goes to.

    Args:
        original: `SchedulerWeightUpdaterManager._select_runners`.
        updater: its `self`.
        selector: "target", "draft" or "all".

    Returns:
        (role, runner) pairs.
    """
    runners = original(updater, selector)
    if get_spec().speculative_algorithm != ALGORITHM:
        return runners
    if selector == "draft":
        return [("draft", _RefusingRunner())]
    return [(role, runner) for role, runner in runners if role != "draft"]


def is_draft_update(path: str) -> bool:
    """Whether an update from disk is a DFlare drafter, for a server that has one."""
    return get_spec().speculative_algorithm == ALGORITHM and is_drafter(path)


def update_from_disk(original: Any, updater: Any, recv_req: Any) -> Any:
    """Hook on SGLang's update from disk: a folder with a drafter is the drafter's.

    Args:
        original: `SchedulerWeightUpdaterManager.update_weights_from_disk`.
        updater: its `self`.
        recv_req: SGLang's `UpdateWeightFromDiskReqInput`.

    Returns:
        SGLang's `UpdateWeightFromDiskReqOutput`.
    """
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqOutput

    if not is_draft_update(recv_req.model_path):
        output = original(updater, recv_req)
        if output.success and get_spec().speculative_algorithm == ALGORITHM:
            updater.draft_worker.renew_draft_head()
        return output
    success, message = swap_drafter(updater.draft_worker, recv_req.model_path, updater.tp_cpu_group)
    if success:
        # Context of the old drafter is of little use to the new one.
        success, message = updater.flush_cache_after_weight_update(recv_req, success, message)
    (logger.info if success else logger.error)("DFLARE: %s", message)
    return UpdateWeightFromDiskReqOutput(success=success, message=message)


def swap_drafter(worker: Any, path: str, group: Any) -> tuple[bool, str]:
    """Load the weights of another drafter of the same shape, in place; all ranks or none.

    Args:
        worker: the `DFlareWorker`, between two steps.
        path: folder of the drafter.
        group: `torch.distributed` group of the tensor-parallel ranks on the CPU.

    Returns:
        Whether it was loaded, and what to tell who asked for it.
    """
    problem, tensors = None, {}
    try:
        tensors = _read(worker.draft_model, path)
    except DFlareError as error:
        problem = str(error)
    problems: list[str | None] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(problems, problem, group)
    if any(problems):
        return False, f"the drafter stays as it is: {next(filter(None, problems))}"
    if torch.device(worker.device).type != "cpu":
        torch.get_device_module(worker.device).synchronize()  # a step may still read the old ones
    worker.draft_model.load_weights(tensors.items())
    worker.renew_draft_head()
    get_context().override("dflare", speculative_draft_model_path=path)  # as /server_info shows it
    return True, f"the drafter is {path} now"


def _read(model: Any, path: str) -> dict[str, torch.Tensor]:
    """The tensors of a drafter that computes what the served one does.

    Raises:
        CheckpointError: it is another kind of drafter, or damaged.
        UnsupportedError: the served one is quantised.
    """
    if any(parameter.dtype.itemsize == 1 for parameter in model.parameters()):
        raise UnsupportedError(
            "the server quantised its drafter when it loaded it, and does so at its start only; "
            "restart it for another drafter"
        )
    config = read_config(path)
    given, expected = (c.model_dump(exclude={"dtype"}) for c in (config, model.draft_config))
    differing = [
        f"{name} is {given[name]!r}, served is {value!r}"
        for name, value in expected.items()
        if given[name] != value
    ]
    if differing:
        raise CheckpointError(
            f"{path}: {'; '.join(differing)}; a running server takes a drafter of the same shape "
            "only: restart it for this one"
        )
    check_finite(path, config)
    return load_tensors(path, config)
