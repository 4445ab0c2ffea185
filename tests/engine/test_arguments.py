"""What SGLang allows DFLASH by name, DFLARE takes over or refuses by name at the arguments."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import sglang.srt
import torch

from dflare.checkpoint import DraftConfig
from dflare.engine.pair import _REFUSED_FLAGS, _check_flags
from dflare.errors import UnsupportedError

pytestmark = pytest.mark.slow  # imports SGLang

# Every line of SGLang 0.5.23 that knows DFLASH by its name, and what DFLARE does there.
BY_NAME = {
    "arg_groups/attention_hook.py": "replayssm with ragged verification: refused, in pair.py",
    "arg_groups/cp_tp_group_sharing_hook.py": "refused there by name",
    "arg_groups/kv_cache_hook.py": "native NVFP4: refused there; unified memory: in pair.py",
    "arg_groups/layernorm_sp_hook.py": "refused there by name",
    "arg_groups/lora_hook.py": "refused, in pair.py",
    "arg_groups/model_overrides/minimax_m3.py": "MiniMax M3.1 NVFP4: refused there by name",
    "arg_groups/model_overrides/nemotron_h.py": "draft backend: algorithm.py chooses it",
    "arg_groups/speculative_hook.py": "block verification: refused there; draft window: a line "
    "in the log; the others are asked as DFLASH by _handle_dflash",
    "arg_groups/validation_hook.py": "capture of taps without a draft: not DFLARE's",
    "disaggregation/mooncake/conn.py": "a guard of CP/TP group sharing, which is refused",
    "mem_cache/kv_cache_configurator.py": "a guard of replayssm: refused, in pair.py",
    "speculative/dflash_worker_v2.py": "a label in the log",
    "speculative/spec_utils.py": "hooked",
}


def test_every_place_that_knows_dflash_by_name_is_known():
    root = Path(sglang.srt.__path__[0])
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"""["']DFLASH["']""", path.read_text(encoding="utf-8"))
    }
    assert found == set(BY_NAME)


def arguments(**changes) -> SimpleNamespace:
    facts = dict.fromkeys(_REFUSED_FLAGS) | {"speculative_draft_kv_cache_dtype": None}
    return SimpleNamespace(**(facts | changes))


def test_the_flags_that_are_refused_are_flags_of_sglang():
    from sglang.srt.server_args import ServerArgs

    for name in vars(arguments()):
        assert hasattr(ServerArgs(model_path="none"), name), name


@pytest.mark.parametrize("flag", _REFUSED_FLAGS)
def test_a_refused_flag_is_named(flag):
    _check_flags(arguments())
    with pytest.raises(UnsupportedError, match="--" + flag.replace("_", "-")):
        _check_flags(arguments(**{flag: True}))


@pytest.mark.parametrize("dtype", [None, "auto", "bf16", "bfloat16"])
def test_the_drafters_cache_has_a_dtype_of_its_own(dtype):
    _check_flags(arguments(speculative_draft_kv_cache_dtype=dtype))


def test_a_quantised_cache_of_the_drafter_is_refused():
    with pytest.raises(UnsupportedError, match=r"leave it out \(the target's --kv-cache-dtype"):
        _check_flags(arguments(speculative_draft_kv_cache_dtype="fp8_e4m3"))


def test_an_fp8_cache_of_the_target_leaves_the_drafters_as_it_is(monkeypatch):
    """The draft pool would inherit the target's --kv-cache-dtype."""
    from sglang.srt.arg_groups import speculative_hook
    from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype

    from dflare.engine import pair
    from dflare.engine.algorithm import DFlareAlgorithm

    monkeypatch.setattr(pair, "check_server_pair", lambda _: DraftConfig.model_construct())
    monkeypatch.setattr(speculative_hook, "_handle_dflash", lambda _: None)
    given = SimpleNamespace(
        kv_cache_dtype="fp8_e4m3",
        speculative_draft_kv_cache_dtype=None,
        speculative_num_draft_tokens=8,
        speculative_dflash_block_size=None,
        speculative_draft_attention_backend="dflare",
        speculative_draft_window_size=None,
        min_free_slots_delay=1,
        pp_size=1,
    )
    DFlareAlgorithm("DFLARE", lambda _: None, supports_overlap=True).handle_server_args(given)
    _, dtype = configure_kv_cache_dtype(
        server_args_kv_cache_dtype=given.kv_cache_dtype,
        model=None,
        model_dtype=torch.bfloat16,
        is_draft_worker=True,
        is_dflash=True,
        speculative_draft_attention_backend="dflare",
        speculative_draft_kv_cache_dtype=given.speculative_draft_kv_cache_dtype,
    )
    assert dtype == torch.bfloat16


def test_the_draft_model_reads_the_revision_that_was_asked_for(monkeypatch):
    from dflare.engine.models import qwen_dflare

    class Found(Exception):
        pass

    def find(path, revision):
        raise Found(path, revision)

    spec = SimpleNamespace(
        speculative_draft_model_path="owner/name", speculative_draft_model_revision="v2"
    )
    monkeypatch.setattr(qwen_dflare, "get_spec", lambda: spec)
    monkeypatch.setattr(qwen_dflare, "find_folder", find)
    with pytest.raises(Found, match=r"\('owner/name', 'v2'\)"):
        qwen_dflare.QwenDFlareDraftModel(config=None)
