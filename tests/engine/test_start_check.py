"""A server refuses what no kernel takes before it loads a model, not at the first request."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import random_draft_config, write_random_draft, write_random_target

from dflare.checkpoint import Rope
from dflare.engine.kernel_check import check_kernels
from dflare.errors import DFlareError, UnsupportedError

pytestmark = pytest.mark.slow  # imports SGLang

QWEN = {  # the sizes of a drafter for Qwen3-4B
    "num_layers": 7,
    "hidden_size": 2560,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "num_target_layers": 36,
    "taps": tuple(range(9)),
    "block_size": 16,
}


def arguments(device: str, **flags: Any) -> SimpleNamespace:
    given = {"dtype": "bfloat16", "speculative_num_draft_tokens": None}
    return SimpleNamespace(device=device, speculative_dflash_block_size=None, **(given | flags))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.configs.model_config  # noqa: F401  (before torch is made to pretend)

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def test_a_drafter_within_the_limits_starts(gpu):
    check_kernels(arguments("cuda"), random_draft_config(**QWEN))
    beyond = {"num_layers": 17, "hidden_size": 9000, "head_dim": 16}
    check_kernels(arguments("cpu", dtype="float32"), random_draft_config(**(QWEN | beyond)))


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"num_layers": 17}, {}, "17 layers, expected at most 16"),
        ({"num_target_layers": 40, "taps": tuple(range(33))}, {}, "33 taps, expected at most 32"),
        ({"hidden_size": 8200}, {}, "hidden size 8200"),
        ({}, {"speculative_num_draft_tokens": 33}, "block size 33"),
        ({"num_heads": 128, "num_kv_heads": 1}, {}, "128 query heads a KV head in blocks of 16"),
        ({"head_dim": 96}, {}, "head_dim 96"),
        ({}, {"dtype": "float32"}, "runs in float32; on cuda .* pass --dtype bfloat16"),
    ],
)
def test_what_the_operators_would_refuse_is_refused_at_the_arguments(gpu, change, flags, message):
    with pytest.raises(DFlareError, match=message):
        check_kernels(arguments("cuda", **flags), random_draft_config(**(QWEN | change)))


def test_a_rotation_that_no_kernel_has_is_refused(gpu):
    rope = Rope(theta=10000.0, partial_rotary_factor=24 / 128)
    draft = random_draft_config(**QWEN).model_copy(update={"rope": rope})
    with pytest.raises(DFlareError, match="24 rotated dimensions"):
        check_kernels(arguments("cuda"), draft)


def test_a_library_without_kernels_for_the_gpu_is_refused_before_weights_are_read(
    tmp_path, monkeypatch
):
    import sglang.srt.configs.model_config  # noqa: F401  (before torch is made to pretend)

    from dflare.engine.pair import _REFUSED_FLAGS, check_server_pair

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    draft = write_random_draft(tmp_path / "draft")
    (draft / "model.safetensors").unlink()  # read later: this would be wrong too
    server_args = arguments(
        "cuda",
        speculative_draft_model_path=str(draft),
        speculative_draft_model_revision=None,
        speculative_draft_kv_cache_dtype=None,
        model_path=str(write_random_target(tmp_path / "target")),
        **dict.fromkeys(_REFUSED_FLAGS),
    )
    with pytest.raises(DFlareError, match=r"without CUDA kernels.*DFLARE_CUDA=require pip install"):
        check_server_pair(server_args)


def test_a_cache_of_another_dtype_is_refused_by_the_worker():
    from dflare.engine.worker import DFlareWorker

    model = SimpleNamespace(context_kv_proj=torch.empty(1, dtype=torch.bfloat16))
    pool = torch.empty(1, dtype=torch.float8_e5m2)
    with pytest.raises(UnsupportedError, match=r"serve without .*kv-cache-dtype"):
        DFlareWorker._check_cache(SimpleNamespace(draft_model=model, _k_pools=[pool]))
