"""The worker refuses a drafter that no kernel takes when it starts, not at the first request."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dflare.errors import DFlareError

pytestmark = pytest.mark.slow  # imports SGLang's worker


def started(device: str, **changes: Any) -> SimpleNamespace:
    """What `_check_kernels` sees of a worker with Qwen3-4B's drafter, some sizes changed."""
    sizes = {"layers": 7, "taps": 9, "hidden": 2560, "rotary": 128, "block": 16, "heads": 32}
    sizes |= {"head_dim": 128, "cache": torch.bfloat16} | changes
    attention = SimpleNamespace(
        num_heads=sizes["heads"],
        num_kv_heads=1,
        rotary_emb=SimpleNamespace(cos_sin_cache=torch.empty(4, sizes["rotary"])),
    )
    model = SimpleNamespace(
        context_kv_proj=torch.empty(
            sizes["layers"], 2 * sizes["head_dim"], sizes["hidden"], dtype=torch.bfloat16
        ),
        fusion_probs=torch.empty(sizes["layers"], sizes["taps"]),
        layers=[SimpleNamespace(self_attn=attention)],
    )
    pool = SimpleNamespace(
        device=torch.device(device), dtype=sizes["cache"], shape=(8, 1, sizes["head_dim"])
    )
    return SimpleNamespace(draft_model=model, _k_pools=[pool], block_size=sizes["block"])


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch):
    from dflare.engine.worker import DFlareWorker

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return lambda *args, **changes: DFlareWorker._check_kernels(started(*args, **changes))


def test_a_drafter_within_the_limits_starts(check):
    check("cuda:0")
    check("cpu", layers=17, taps=40, hidden=9000, rotary=8, block=40, head_dim=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 17}, "17 layers, expected at most 16"),
        ({"taps": 33}, "33 taps, expected at most 32"),
        ({"hidden": 8200}, "hidden size 8200"),
        ({"rotary": 24}, "24 rotated dimensions"),
        ({"block": 33, "heads": 8}, "block size 33"),
        ({"heads": 128}, "128 query heads a KV head in blocks of 16"),
        ({"head_dim": 96}, "head_dim 96"),
        ({"cache": torch.float8_e5m2}, "serve without --speculative-draft-kv-cache-dtype"),
    ],
)
def test_what_the_operators_would_refuse_is_refused_at_start(check, change, message):
    with pytest.raises(DFlareError, match=message):
        check("cuda:0", **change)
