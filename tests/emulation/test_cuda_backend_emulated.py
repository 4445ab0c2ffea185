"""The CUDA attention backend on SGLang's graph protocol, its kernels on the emulator.

A CUDA graph is played by `RecordedGraph`: it keeps the operators of one step with the very tensors
that they were given, and runs them again, so whatever a step takes from the host stays as it was at
capture.
"""

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import build_launchers
from kernel_cases import AttentionCase
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("sglang")

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.cuda_graph_buffer_registry import build_decode_registry
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from dflare import ops
from dflare.engine.cuda_attention import CudaBlockAttentionBackend
from dflare.errors import UnsupportedError

pytestmark = pytest.mark.slow

WINDOWS = (-1, 40, -1)  # of three layers; the sliding one is causal, as in DFlareAttention
CASE = AttentionCase((150, 33), block=8, head_dim=64, rotary=64)
TOLERANCE = 2e-2


class RecordedGraph(TorchDispatchMode):
    """Records the operators that run inside it; `replay` runs them on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            out.copy_(func(*args, **kwargs))

    @property
    def names(self) -> list[str]:
        return [func.name().split("::")[1] for func, *_ in self.calls]


@pytest.fixture(autouse=True)
def emulated_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.ops.load_library(str(build_launchers()))
    for name in ("block_attention", "block_attention_schedule"):
        monkeypatch.setattr(ops, name, getattr(torch.ops.dflare_emulated, name))


def attention_layer(case: AttentionCase, x: dict[str, Tensor], layer_id: int) -> SimpleNamespace:
    """What the backend reads of a `DFlareAttention`; on this rank the case's heads are local."""
    window = WINDOWS[layer_id]
    return SimpleNamespace(
        attn=RadixAttention(
            num_heads=case.heads,
            head_dim=case.head_dim,
            scaling=case.scale,
            num_kv_heads=case.kv_heads,
            layer_id=layer_id,
            sliding_window_size=window,
            attn_type=AttentionType.ENCODER_ONLY if window < 0 else AttentionType.DECODER,
        ),
        q_norm=SimpleNamespace(weight=x["q_norm_weight"], variance_epsilon=1e-6),
        k_norm=SimpleNamespace(weight=x["k_norm_weight"], variance_epsilon=1e-6),
        rotary_emb=SimpleNamespace(cos_sin_cache=x["cos_sin_cache"]),
    )


def model_runner(case: AttentionCase, x: dict[str, Tensor], **changed: Any) -> SimpleNamespace:
    layers = [
        SimpleNamespace(self_attn=attention_layer(case, x, layer_id))
        for layer_id in range(len(WINDOWS))
    ]
    pools = SimpleNamespace(get_kv_buffer=lambda _layer_id: (x["k_pool"], x["v_pool"]))
    runner = {
        "is_draft_worker": True,
        "model": SimpleNamespace(layers=layers),
        "req_to_token_pool": SimpleNamespace(req_to_token=x["req_to_token"]),
        "token_to_kv_pool": pools,
    }
    return SimpleNamespace(**(runner | changed))


def forward_batch(case: AttentionCase, x: dict[str, Tensor]) -> ForwardBatch:
    """As `DFlashWorkerV2` makes it for a draft block."""
    rows = x["positions"].shape[0]
    return ForwardBatch(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=x["seq_lens"].shape[0],
        input_ids=torch.zeros(rows, dtype=torch.long),
        req_pool_indices=x["req_pool_indices"],
        seq_lens=x["seq_lens"],
        out_cache_loc=torch.zeros(rows, dtype=torch.long),
        seq_lens_sum=0,
        positions=x["positions"],
    )


def run_layers(
    backend: CudaBlockAttentionBackend,
    layers: list[SimpleNamespace],
    qkv: Tensor,
    batch: ForwardBatch,
) -> list[Tensor]:
    return [
        backend.block_attention(layer.self_attn, qkv, batch.positions, batch) for layer in layers
    ]


def check(case: AttentionCase, outs: list[Tensor]) -> None:
    for window, out in zip(WINDOWS, outs, strict=True):
        layer_case = replace(case, window=window, causal=window >= 0)
        assert layer_case.error(out[None]) < TOLERANCE, f"window {window}"


@pytest.mark.parametrize(
    "case",
    [CASE, replace(CASE, lens=(0,), lens_64bit=False), replace(CASE, heads=4, kv_heads=1, page=16)],
    ids=str,
)
def test_attends_eagerly(case: AttentionCase) -> None:
    x = case.inputs()
    runner = model_runner(case, x)
    backend = CudaBlockAttentionBackend(runner)
    batch = forward_batch(case, x)
    backend.init_forward_metadata(batch)
    check(case, run_layers(backend, runner.model.layers, x["qkv"][0], batch))


def captured_step() -> tuple[Any, ...]:
    """A step for four requests, captured as SGLang's decode graph runner does it."""
    most = replace(CASE, lens=(200,) * 4)
    x = {name: torch.zeros_like(tensor) for name, tensor in most.inputs().items()}
    x["req_to_token"] = torch.cat([x["req_to_token"][:1], x["req_to_token"]])
    runner = model_runner(CASE, x)
    backend = CudaBlockAttentionBackend(runner)
    rows = len(most.lens) * CASE.block
    backend.init_cuda_graph_state(len(most.lens), rows)
    registry = build_decode_registry(
        device=torch.device("cpu"),
        max_bs=len(most.lens),
        max_num_token=rows,
        seq_len_fill_value=backend.get_cuda_graph_seq_len_fill_value(),
        cache_loc_dtype=torch.int64,
        share_pool=False,
    )
    names = ("positions", "req_pool_indices", "seq_lens")
    static = x | {name: registry.get_slot(name).buffer for name in names}
    static["seq_lens"].fill_(backend.get_cuda_graph_seq_len_fill_value())
    batch, qkv = forward_batch(CASE, static), static["qkv"][0]
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    with RecordedGraph() as graph:
        backend.init_forward_metadata_in_graph(batch)
        outs = run_layers(backend, runner.model.layers, qkv, batch)
    return backend, registry, static, graph, outs


def fill(static: dict[str, Tensor], case: AttentionCase) -> ForwardBatch:
    """Put a case's model inputs and tables into the captured memory; row 0 stays the padding's."""
    x = case.inputs()
    static["qkv"].zero_()
    static["qkv"][:, : x["qkv"].shape[1]] = x["qkv"]
    for name in ("q_norm_weight", "k_norm_weight", "cos_sin_cache", "k_pool", "v_pool"):
        static[name][: x[name].shape[0]] = x[name]
    table = x["req_to_token"]
    static["req_to_token"].zero_()
    static["req_to_token"][1 : 1 + table.shape[0], : table.shape[1]] = table
    return forward_batch(case, x | {"req_pool_indices": x["req_pool_indices"] + 1})


def test_a_replay_follows_the_batch_that_sglang_filled_in() -> None:
    backend, registry, static, graph, outs = captured_step()
    schedules = [backend.block_schedule(SimpleNamespace(sliding_window_size=w)) for w in WINDOWS]
    addresses = [t.data_ptr() for t in (*schedules, *outs)]
    for seed, lens in enumerate([(150, 33), (0, 0), (200,), (1, 64, 199), (17, 0, 5, 130)]):
        case = replace(CASE, lens=lens, seed=seed)
        batch, rows = fill(static, case), len(lens) * CASE.block
        registry.fill_from(
            batch,
            raw_bs=len(lens),
            padded_bs=4,
            raw_num_tokens=rows,
            padded_num_tokens=4 * CASE.block,
        )
        backend.init_forward_metadata_out_graph(batch)
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        check(case, [out[:rows] for out in outs])
    assert addresses == [t.data_ptr() for t in (*schedules, *outs)]


def test_a_step_is_one_schedule_a_window_and_one_attention_a_layer() -> None:
    """No copy to the host, no other operator: what the graph holds is what the kernels do."""
    *_, graph, _ = captured_step()
    assert graph.names == ["block_attention_schedule"] * 2 + ["block_attention"] * len(WINDOWS)


def test_declares_to_sglang_what_it_reads_and_when() -> None:
    backend = CudaBlockAttentionBackend(model_runner(CASE, CASE.inputs()))
    assert not backend.needs_cpu_seq_lens
    assert backend.shared_read_ends(ForwardMode.TARGET_VERIFY) is SharedReadEnds.POST_REPLAY


def test_overrides_only_hooks_of_sglang_with_their_parameters() -> None:
    ours = {
        name: value
        for name, value in vars(CudaBlockAttentionBackend).items()
        if inspect.isfunction(value) and not name.startswith("_") and name != "block_schedule"
    }
    assert len(ours) >= 6
    for name, function in ours.items():
        upstream = inspect.signature(getattr(AttentionBackend, name)).parameters
        if name not in ("forward_decode", "forward_extend"):
            assert list(inspect.signature(function).parameters) == list(upstream), name


def test_the_target_is_refused_with_a_way_out() -> None:
    with pytest.raises(UnsupportedError, match="leave out --attention-backend"):
        CudaBlockAttentionBackend(model_runner(CASE, CASE.inputs(), is_draft_worker=False))


def test_a_drafter_with_stock_attention_layers_is_refused_with_a_way_out() -> None:
    x = CASE.inputs()
    runner = model_runner(CASE, x)
    backend = CudaBlockAttentionBackend(runner)
    layer, heads = runner.model.layers[0].self_attn.attn, torch.zeros(16, 8, 64)
    with pytest.raises(UnsupportedError, match="--speculative-draft-attention-backend flashinfer"):
        backend.forward(heads, heads, heads, layer, forward_batch(CASE, x))
