"""Online weight updates reach the target only; an update of the drafter alone is refused by name.

SGLang offers every tensor of an update to all the runners that its selector names. The names of a
target's layers are a drafter's too ("layers.0.self_attn.q_proj.weight"), so nothing in an update
says whose it is.
"""

from typing import Any

from sglang.srt.runtime_context import get_spec

from dflare.engine.names import ALGORITHM

_REFUSAL = (
    "DFLARE does not update a drafter online: its tensors cannot be told from the target's. Send "
    'the update with selector "target" or "all", and restart the server for another drafter'
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
