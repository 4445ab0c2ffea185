"""The CUDA operators on a GPU: against float64, in CUDA graphs, next to PyTorch's rounding."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import AppendCase, AttentionCase
from torch import Tensor

from dflare import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3}


def on_gpu(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in x.items()}


def append(case: AppendCase, x: dict[str, Tensor]) -> None:
    ops.append_context_kv(*case.arguments(x))


def attend(case: AttentionCase, x: dict[str, Tensor], qkv: Tensor, schedule: Tensor) -> Tensor:
    qkv = qkv.clone()  # as in a drafter, the kernel before the attention writes its qkv
    return ops.block_attention(*case.arguments(x, qkv), schedule)


def attention_error(case: AttentionCase) -> float:
    x = on_gpu(case.inputs())
    schedule = case.schedule(ops, x)
    return case.error(torch.stack([attend(case, x, qkv, schedule) for qkv in x["qkv"]]).cpu())


@pytest.mark.parametrize(
    "case",
    [
        AppendCase(commit_lens=(3, 0, 9), bias=True, kv_heads=2),
        AppendCase(rows=70, head_dim=256, rotary=64),
        AppendCase(rows=330, hidden=64, layers=1),  # GEMM path
        AttentionCase((300, 0, 17)),
        AttentionCase((700,), layers=2),  # cut into parts
        AttentionCase((90,), head_dim=64, rotary=64, heads=16, kv_heads=1, window=40),
        AttentionCase((40,), head_dim=256, causal=True),
    ],
    ids=str,
)
def test_small_shapes(case: AppendCase | AttentionCase) -> None:
    """Through every kernel; what compute-sanitizer runs (bench/kernels/gpu_session.sh)."""
    if isinstance(case, AttentionCase):
        assert attention_error(case) < TOLERANCE[case.dtype]
        return
    x = on_gpu(case.inputs())
    append(case, x)
    assert case.error(x["k_pools"].cpu(), x["v_pools"].cpu()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        AppendCase(),
        AppendCase(commit_lens=(3, 0, 16, 9), kv_heads=8, hidden=2560, taps=9, layers=7),
        AppendCase(commit_lens=(0, 0)),
        AppendCase(commit_lens=(7,) * 40, block=16, kv_heads=2, hidden=512),
        AppendCase(commit_lens=(5, 31) * 20, block=32, kv_heads=1, hidden=512),  # GEMM path
        AppendCase(rows=1, head_dim=64, rotary=64, hidden=2880, kv_heads=8),
        AppendCase(rows=100, head_dim=256, rotary=128, hidden=1152, bias=True),
        AppendCase(rows=300, hidden=4096, taps=16, layers=12, kv_heads=8),
        AppendCase(rows=2500, hidden=512),  # two panels
    ],
    ids=str,
)
def test_appends_the_context_of_every_valid_row(case: AppendCase, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    x = on_gpu(case.inputs())
    append(case, x)
    assert case.error(x["k_pools"].cpu(), x["v_pools"].cpu()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase((0,)),
        AttentionCase((1,)),
        AttentionCase((1000,), heads=32, kv_heads=8),
        AttentionCase((20000, 17, 0, 300), heads=32, kv_heads=8, page=64, layers=2),
        AttentionCase((900,) * 40, heads=32, kv_heads=8, block=8, page=16),
        AttentionCase((700, 64), head_dim=64, rotary=64, heads=64, kv_heads=8),
        AttentionCase((700, 63), head_dim=256, rotary=64, heads=16, kv_heads=2, block=32),
        AttentionCase((5000, 3), window=1000, causal=True, heads=8, kv_heads=8),
        AttentionCase((5000, 3), heads=32, kv_heads=2, block=32, lens_64bit=False),
    ],
    ids=str,
)
def test_attends_to_context_and_block(case: AttentionCase, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    assert attention_error(case) < TOLERANCE[dtype]


def test_the_result_is_the_same_every_time() -> None:
    case = AttentionCase((9000, 100), heads=32, kv_heads=8)
    x = on_gpu(case.inputs())
    schedule = case.schedule(ops, x)
    first = attend(case, x, x["qkv"][0], schedule)
    for _ in range(20):
        assert torch.equal(attend(case, x, x["qkv"][0], schedule), first)


def test_a_graph_follows_the_lengths_of_each_replay() -> None:
    """Captured once, replayed for other lengths, tables and rows: nothing depends on the host."""
    cases = [AttentionCase((700, 3000), seed=seed) for seed in range(3)]
    cases += [replace(cases[0], lens=lens) for lens in ((0, 3000), (3000, 1), (17, 64))]
    inputs = [on_gpu(case.inputs()) for case in cases]
    slots = max(x["k_pool"].shape[0] for x in inputs)
    static = {name: tensor.clone() for name, tensor in inputs[0].items()}
    for name in ("k_pool", "v_pool"):
        static[name] = inputs[0][name].new_full((slots, *inputs[0][name].shape[1:]), torch.nan)

    def step() -> Tensor:
        schedule = cases[0].schedule(ops, static)
        layers = [attend(cases[0], static, static["qkv"][0], schedule) for _ in range(2)]
        return layers[-1]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for case, x in zip(cases, inputs, strict=True):
        for name, tensor in x.items():
            rows = slice(tensor.shape[0])
            if name == "req_to_token":
                static[name][:, : tensor.shape[1]].copy_(tensor)
            else:
                static[name][rows].copy_(tensor)
        out.fill_(torch.nan)
        graph.replay()
        assert case.error(out[None].cpu()) < TOLERANCE[case.dtype]


def test_an_append_graph_follows_the_committed_lengths_of_each_replay() -> None:
    cases = [AppendCase(commit_lens=lens) for lens in ((3, 16, 0), (0, 0, 0), (16, 16, 16))]
    inputs = [on_gpu(case.inputs()) for case in cases]
    static = {name: tensor.clone() for name, tensor in inputs[-1].items()}
    append(cases[-1], static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append(cases[-1], static)
    for case, x in zip(cases, inputs, strict=True):
        for name, tensor in x.items():
            static[name].copy_(tensor)
        graph.replay()
        pools = static["k_pools"].cpu(), static["v_pools"].cpu()
        assert case.error(*pools) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_not_less_accurate_than_pytorch(dtype: torch.dtype) -> None:
    """At most 1.5 times the error of the op's plain PyTorch reference in the same type."""
    for context in (
        AppendCase(commit_lens=(3, 16, 9), kv_heads=8, hidden=2560, taps=9, dtype=dtype),
        AppendCase(rows=700, kv_heads=8, hidden=2560, taps=9, dtype=dtype),  # GEMM path
    ):
        x, expected = on_gpu(context.inputs()), on_gpu(context.inputs())
        append(context, x)
        ops.append_context_kv_reference(*context.arguments(expected))
        allowed = 1.5 * context.error(expected["k_pools"].cpu(), expected["v_pools"].cpu())
        assert context.error(x["k_pools"].cpu(), x["v_pools"].cpu()) <= allowed
    attention = AttentionCase((1000, 50), heads=32, kv_heads=8, dtype=dtype)
    x = on_gpu(attention.inputs())
    qkv = x["qkv"][0]
    reference = ops.block_attention_reference(*attention.arguments(x, qkv))
    ours = attend(attention, x, qkv, attention.schedule(ops, x))
    allowed = 1.5 * attention.error(reference[None].cpu())
    assert attention.error(ours[None].cpu()) <= allowed


def test_wrong_arguments_raise_with_a_way_out() -> None:
    case = AttentionCase((64,))
    x = on_gpu(case.inputs())
    qkv = x["qkv"][0]
    schedule = case.schedule(ops, x)
    with pytest.raises(RuntimeError, match="block_attention_schedule"):
        attend(case, x, qkv, None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="schedule has shape"):
        attend(case, x, qkv, schedule[1:])
    with pytest.raises(RuntimeError, match="qkv has dtype"):
        attend(case, x, qkv.float(), schedule)
    with pytest.raises(RuntimeError, match="k_norm_weight is on cpu"):
        attend(case, x | {"k_norm_weight": x["k_norm_weight"].cpu()}, qkv, schedule)
