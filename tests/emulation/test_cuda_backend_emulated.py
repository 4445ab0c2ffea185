"""The CUDA attention backend on SGLang's graph protocol, its kernels on the emulator.

A CUDA graph is played by `graph_protocol.RecordedGraph`: it keeps the operators of one step with
the very tensors that they were given and runs them again, so whatever a step takes from the host
stays as it was at capture.
"""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from emulated import emulator
from op_cases import AttentionCase
from torch import Tensor

from dflare.errors import UnsupportedError

pytestmark = pytest.mark.slow

CASE = AttentionCase((150, 33), block=8, head_dim=64, rotary=64)
TOLERANCE = 2e-2


@pytest.fixture(autouse=True)
def emulated_ops() -> Iterator[None]:
    with emulator(CASE.dtype, CASE.head_dim).installed():
        yield


@pytest.fixture(scope="module")
def protocol() -> ModuleType:
    """Not imported above: SGLang takes half a minute, and the fast tests do without."""
    return pytest.importorskip("graph_protocol")


def check(protocol: ModuleType, case: AttentionCase, outs: list[Tensor]) -> None:
    for window, out in zip(protocol.WINDOWS, outs, strict=True):
        layer_case = replace(case, window=window, causal=window >= 0)
        assert layer_case.error(out[None]) < TOLERANCE, f"window {window}"


@pytest.mark.parametrize(
    "case",
    [CASE, replace(CASE, lens=(0,), lens_64bit=False), replace(CASE, heads=4, kv_heads=1, page=16)],
    ids=str,
)
def test_attends_eagerly(protocol: ModuleType, case: AttentionCase) -> None:
    x = case.inputs()
    runner, batch = protocol.model_runner(case, x), protocol.forward_batch(x)
    backend = protocol.CudaBlockAttentionBackend(runner)
    backend.init_forward_metadata(batch)
    check(protocol, case, protocol.run_layers(backend, runner.model.layers, x["qkv"][0], batch))


def test_a_replay_follows_the_batch_that_sglang_filled_in(protocol: ModuleType) -> None:
    step = protocol.CapturedStep(CASE)
    addresses = step.addresses()
    for seed, lens in enumerate([(150, 33), (0, 0), (200,), (1, 64, 199), (17, 0, 5, 130)]):
        case = replace(CASE, lens=lens, seed=seed)
        check(protocol, case, step.replay(case))
    assert step.addresses() == addresses


def test_a_step_is_one_schedule_a_window_and_one_attention_a_layer(protocol: ModuleType) -> None:
    """No copy to the host, no other operator: what the graph holds is what the kernels do."""
    expected = ["block_attention_schedule"] * 2 + ["block_attention"] * len(protocol.WINDOWS)
    assert protocol.CapturedStep(CASE).graph.names == expected


def test_declares_to_sglang_what_it_reads_and_when(protocol: ModuleType) -> None:
    from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

    backend = protocol.CudaBlockAttentionBackend(protocol.model_runner(CASE, CASE.inputs()))
    assert not backend.needs_cpu_seq_lens
    mode = protocol.ForwardMode.TARGET_VERIFY
    assert backend.shared_read_ends(mode) is SharedReadEnds.POST_REPLAY


def test_overrides_only_hooks_of_sglang_with_their_parameters(protocol: ModuleType) -> None:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    ours = {
        name: value
        for name, value in vars(protocol.CudaBlockAttentionBackend).items()
        if inspect.isfunction(value) and not name.startswith("_") and name != "block_schedule"
    }
    assert len(ours) >= 6
    for name, function in ours.items():
        upstream = inspect.signature(getattr(AttentionBackend, name)).parameters
        if name not in ("forward_decode", "forward_extend"):
            assert list(inspect.signature(function).parameters) == list(upstream), name


def test_the_target_is_refused_with_a_way_out(protocol: ModuleType) -> None:
    target = protocol.model_runner(CASE, CASE.inputs(), is_draft_worker=False)
    with pytest.raises(UnsupportedError, match="leave out --attention-backend"):
        protocol.CudaBlockAttentionBackend(target)


def test_a_drafter_with_stock_attention_layers_is_refused(protocol: ModuleType) -> None:
    x = CASE.inputs()
    runner = protocol.model_runner(CASE, x)
    backend = protocol.CudaBlockAttentionBackend(runner)
    layer, heads = runner.model.layers[0].self_attn.attn, torch.zeros(16, 8, 64)
    with pytest.raises(UnsupportedError, match="--speculative-draft-attention-backend flashinfer"):
        backend.forward(heads, heads, heads, layer, protocol.forward_batch(x))
