"""Every function of SGLang that we replace is in one list, and a server starts with all or not."""

import dataclasses
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from sglang.srt.plugins import load_plugins

from dflare.engine import hooks as module
from dflare.engine import online_update
from dflare.engine.hooks import apply_scheduler_hooks, check_hooks, hooks
from dflare.errors import UnsupportedError

pytestmark = pytest.mark.slow  # imports most of SGLang


@pytest.fixture(autouse=True)
def plugins():
    load_plugins()
    apply_scheduler_hooks()


def test_every_hook_is_in_place():
    assert len(hooks()) >= 5
    check_hooks()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": lambda *_: None}, "spec_need_hidden_states is not hooked"),
        ({"parameters": "batch"}, r"takes \(\), expected \(batch\)"),
        ({"target": "sglang.srt.speculative.spec_utils.gone"}, "spec_utils.gone does not exist"),
        ({"target": "sglang.srt.no_such_module.f"}, "no_such_module.f does not exist"),
    ],
)
def test_a_hook_that_is_not_in_place_is_named(change, message):
    hook = next(h for h in hooks() if h.target.endswith("spec_need_hidden_states"))
    with pytest.raises(UnsupportedError, match=message):
        check_hooks((dataclasses.replace(hook, **change),))


@pytest.mark.parametrize(
    ("parameters", "fits"), [("self text ...", True), ("self input_ids ...", False)]
)
def test_of_many_parameters_the_first_are_looked_at(parameters, fits):
    hook = next(h for h in hooks() if h.target.endswith("GenerateReqInput.__init__"))
    with nullcontext() if fits else pytest.raises(UnsupportedError, match=r"expected .self input"):
        check_hooks((dataclasses.replace(hook, parameters=parameters),))


def test_a_hook_that_sglang_failed_to_apply_is_found():
    """SGLang only logs it (`HookRegistry.apply_hooks`)."""
    script = """
from sglang.srt.plugins.hook_registry import HookRegistry
apply = HookRegistry._apply_target.__func__
def failing(cls, target, hooks):
    if target.endswith("_forces_eagle_topk_one"):
        raise RuntimeError("planted")
    apply(cls, target, hooks)
HookRegistry._apply_target = classmethod(failing)
from sglang.srt.plugins import load_plugins
load_plugins()
from dflare.engine.hooks import apply_scheduler_hooks, check_hooks
apply_scheduler_hooks()
check_hooks()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode != 0
    assert "_forces_eagle_topk_one is not hooked" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("algorithm", "selector", "roles"),
    [
        ("DFLARE", "all", ["target"]),
        ("DFLARE", "target", ["target"]),
        ("DFLASH", "all", ["target", "draft"]),
    ],
)
def test_an_online_update_reaches_the_target_only(monkeypatch, algorithm, selector, roles):
    assert [role for role, _ in select(monkeypatch, algorithm, selector)] == roles


def test_an_online_update_of_the_drafter_is_refused_by_name(monkeypatch):
    ((role, runner),) = select(monkeypatch, "DFLARE", "draft")
    assert role == "draft"
    runner.weight_updater.begin_weight_update()
    for answer in (
        runner.weight_updater.update_weights_from_tensor(named_tensors=[], load_format=None),
        runner.weight_updater.load_weights_from_distributed([]),
    ):
        assert answer == (False, online_update._REFUSAL)
    runner.weight_updater.end_weight_update(run_post_load=True)


def select(monkeypatch, algorithm, selector):
    """What SGLang's own method answers, hook and all."""
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager,
    )

    spec = SimpleNamespace(speculative_algorithm=algorithm)
    monkeypatch.setattr(online_update, "get_spec", lambda: spec)
    workers = {
        f"{name}_worker": SimpleNamespace(weight_update_runners=lambda role=role: [(role, role)])
        for name, role in (("tp", "target"), ("draft", "draft"))
    }
    return SchedulerWeightUpdaterManager._select_runners(SimpleNamespace(**workers), selector)


def test_the_list_has_everything_that_is_replaced():
    """Nothing in the package registers a hook beside the list."""
    source = module.__file__
    from pathlib import Path

    package = Path(source).parents[1]
    users = [p.name for p in package.rglob("*.py") if "HookRegistry.register(" in p.read_text()]
    assert users == ["hooks.py"]
