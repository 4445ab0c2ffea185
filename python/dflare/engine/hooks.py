"""Everything that we replace inside SGLang's code, in one list; each entry says why it is needed.

`HookRegistry` (sglang/srt/plugins/hook_registry.py) patches the function and every module that
imported it by name, and only logs a hook that it could not apply. So the worker calls
`check_hooks` before it loads anything.
"""

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from dflare.engine.failed_step import FAILED_STEP_HOOKS
from dflare.engine.names import ALGORITHM
from dflare.engine.own_platform import own_platform
from dflare.engine.refusals import REFUSALS
from dflare.engine.request_guard import GUARDS
from dflare.engine.states import leave_states, states_folder
from dflare.errors import UnsupportedError


@dataclass(frozen=True)
class Hook:
    """A function of SGLang that ours stands in for.

    Attributes:
        target: dotted name of SGLang's function.
        function: ours; an AROUND hook gets the original first.
        kind: AROUND or REPLACE.
        parameters: the original's parameter names in the tested SGLang, separated by spaces; those
            behind an ellipsis may be any.
    """

    target: str
    function: Callable[..., Any]
    kind: HookType
    parameters: str


def _forces_eagle_topk_one(original, speculative_algorithm) -> bool:
    """The list of algorithms in it knows the DFLASH family by name only."""
    return str(speculative_algorithm).upper() == ALGORITHM or original(speculative_algorithm)


def _spec_need_hidden_states(original) -> bool:
    """As above; like DFLASH's, the drafter's context lives in its own pool, nothing is relayed."""
    from sglang.srt.runtime_context import get_spec

    return get_spec().speculative_algorithm != ALGORITHM and original()


def _apply_penalties_first(original, *, next_token_logits, sampling_info, draft_token_num) -> None:
    """Its caller is in the middle of a long method: penalties come before bias and grammar."""
    penalise = getattr(sampling_info, "dflare_penalise", None)
    if penalise is not None:
        penalise(next_token_logits, draft_token_num)
    original(
        next_token_logits=next_token_logits,
        sampling_info=sampling_info,
        draft_token_num=draft_token_num,
    )


def _sample_prefill(original, *args, **kwargs):
    """It knows seeds with --enable-deterministic-inference only, and never beside min_p."""
    from sglang.srt.runtime_context import get_spec

    if get_spec().speculative_algorithm != ALGORITHM:
        return original(*args, **kwargs)
    from dflare.engine.sampling import sample_prefill

    return sample_prefill(original, *args, **kwargs)


def _runners_to_update(*args, **kwargs):
    """Updates of the target would be loaded into the drafter too."""
    from dflare.engine.online_update import runners_to_update

    return runners_to_update(*args, **kwargs)


def _update_from_disk(*args):
    """A folder may hold another drafter."""
    from dflare.engine.online_update import update_from_disk

    return update_from_disk(*args)


def _update_model_path_info(original, manager, model_path, load_format) -> None:
    """The original takes any update for one of the target, and names the server by it."""
    from dflare.engine.online_update import is_draft_update

    if not is_draft_update(model_path):
        original(manager, model_path, load_format)


_EVERYWHERE = (
    Hook(
        "sglang.srt.arg_groups.model_override_base._forces_eagle_topk_one",
        _forces_eagle_topk_one,
        HookType.AROUND,
        "speculative_algorithm",
    ),
    Hook(
        "sglang.srt.speculative.spec_utils.spec_need_hidden_states",
        _spec_need_hidden_states,
        HookType.AROUND,
        "",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._update_model_path_info",
        _update_model_path_info,
        HookType.AROUND,
        "self model_path load_format",
    ),
)
# Put in place where a worker is built: their modules are for the scheduler's process alone, and
# those of users who do not ask for DFLARE import none of them.
_IN_THE_SCHEDULER = (
    Hook(
        "sglang.srt.speculative.dflash_utils.apply_dflash_verify_logits_adjustments",
        _apply_penalties_first,
        HookType.AROUND,
        "next_token_logits sampling_info draft_token_num",
    ),
    Hook(
        "sglang.srt.layers.sampler.Sampler._sample_from_probs",
        _sample_prefill,
        HookType.AROUND,
        "self probs sampling_info positions simple_sampling_case",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.weight_updater"
        ".SchedulerWeightUpdaterManager._select_runners",
        _runners_to_update,
        HookType.AROUND,
        "self selector",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.weight_updater"
        ".SchedulerWeightUpdaterManager.update_weights_from_disk",
        _update_from_disk,
        HookType.AROUND,
        "self recv_req",
    ),
)
# Only where somebody asks for states: it loads what else the scheduler's process alone needs.
_STATES = Hook(
    "sglang.srt.layers.logits_processor.LogitsProcessor.forward",
    leave_states,
    HookType.AROUND,
    "self input_ids hidden_states lm_head logits_metadata aux_hidden_states "
    "hidden_states_before_norm",
)
_GUARDS = tuple(
    Hook(f"sglang.srt.{target}", function, HookType.AROUND, parameters)
    for target, function, parameters in (*GUARDS, *REFUSALS, *FAILED_STEP_HOOKS)
)


def _at_load() -> tuple[Hook, ...]:
    """Those of every process and, on a platform of this package, the platform's."""
    platform = own_platform()
    states = (_STATES,) if states_folder() else ()
    return _EVERYWHERE + _GUARDS + states + (platform.hooks() if platform else ())


def hooks() -> tuple[Hook, ...]:
    """All hooks of a scheduler's process."""
    return _at_load() + _IN_THE_SCHEDULER


def register_hooks() -> None:
    """Hand those of every process to SGLang, which applies them when all plug-ins are loaded."""
    for hook in _at_load():
        HookRegistry.register(hook.target, hook.function, hook.kind)


def apply_scheduler_hooks() -> None:
    """Put the others in place, before a worker is built; once a process."""
    for hook in _IN_THE_SCHEDULER:
        if _problem(hook):
            HookRegistry.register(hook.target, hook.function, hook.kind)
    HookRegistry.apply_hooks()


def check_hooks(expected: tuple[Hook, ...] | None = None) -> None:
    """Make sure that every hook is in place, on a function that is the one we know.

    Args:
        expected: the hooks to look at; those of this process by default.

    Raises:
        UnsupportedError: naming each hook that is missing and each function that has changed.
    """
    problems = [problem for hook in expected or hooks() if (problem := _problem(hook))]
    if problems:
        raise UnsupportedError(
            "DFLARE replaces functions of SGLang, and not all of them as expected: "
            + "; ".join(problems)
            + ". Look in the log above for 'Failed to apply hooks', unload other plug-ins "
            "(SGLANG_PLUGINS=dflare), or install the SGLang that README.md names"
        )


def _problem(hook: Hook) -> str | None:
    try:
        function = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError):
        return f"{hook.target} does not exist"
    found = " ".join(inspect.signature(inspect.unwrap(function)).parameters)
    first = hook.parameters.removesuffix("...")
    whole = first == hook.parameters
    if not (found == first if whole else found.startswith(first)):
        return f"{hook.target} takes ({found}), expected ({hook.parameters})"
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook.function for cell in cells):
            return None
        function = getattr(function, "__wrapped__", None)
    return f"{hook.target} is not hooked"
