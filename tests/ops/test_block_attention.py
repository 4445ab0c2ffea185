from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import AttentionCase
from op_devices import (
    ATTENTION_TOLERANCE,
    BF16,
    CUDA,
    DEVICES,
    DTYPES,
    DTYPES_AND_SIZES,
    F16,
    F32,
    KERNELS,
    attend,
    attention_error,
    threads,
)

from dflare import ops


def check(device: str, case: AttentionCase, seed: int = 0, **options) -> None:
    assert attention_error(device, case, seed, **options) < ATTENTION_TOLERANCE[case.dtype]


@DEVICES
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase((0,)),
        AttentionCase((1,)),
        AttentionCase((64,)),
        AttentionCase((300, 17, 0), page=16),
        AttentionCase((63, 65), causal=True),
        AttentionCase((200, 5), window=40, page=64),
        AttentionCase((200, 5), window=3, causal=True),
        AttentionCase((90,), window=0),
        AttentionCase((90,), window=1 << 40),
        AttentionCase((100,), rotary=32, lens_64bit=False),
        AttentionCase((100,), heads=6, kv_heads=6, block=2),  # one query head a group, few rows
        AttentionCase((100,), heads=16, kv_heads=1, block=5),  # 80 rows: the 8-warp kernel
        AttentionCase((40,), heads=16, kv_heads=1, block=32),  # 512 rows: four tiles
    ],
    ids=str,
)
def test_equals_the_reference(device, case):
    check(device, case)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(
    "case",
    [
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
def test_equals_the_reference_at_published_shapes(device, case, dtype):
    check(device, replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 256])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_a_cpu_takes_every_head_and_group(group, head_dim, dtype):
    for block in (1, 2, 5, 32):
        case = AttentionCase(
            (70, 3), block, 2 * group, 2, head_dim, head_dim // 2, dtype, causal=True, window=50
        )
        check("cpu", case)


@DEVICES
def test_large_logits_neither_overflow_nor_lose_the_maximum(device):
    # One bit of a rounded query moves such a logit by 0.05: no tighter bound could hold.
    dtype = DTYPES[device][0]
    assert attention_error(device, AttentionCase((150,), logit_scale=100.0, dtype=dtype)) < 5e-2


@KERNELS
def test_parts_with_large_logits_are_merged_without_losing_the_maximum(device):
    """Three parts whose maxima lie far apart, in the type with the narrow exponent."""
    check(device, AttentionCase((600,), logit_scale=100.0, dtype=F16), sm_count=32)


@DEVICES
def test_a_long_context_is_cut_into_parts_and_merged(device):
    case = AttentionCase((3000,), block=4, heads=4, kv_heads=1, dtype=DTYPES[device][0])
    check(device, case, sm_count=32)


@KERNELS
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_parts_are_merged_in_a_cluster_of_blocks_where_that_is_asked_for(
    device, head_dim, monkeypatch
):
    """Of more than eight parts some through global memory, as everywhere else."""
    monkeypatch.setenv("DFLARE_CLUSTER", "1")
    for lens in ((600, 900), (5500, 600, 0)):
        case = AttentionCase(lens, head_dim=head_dim, rotary=64, heads=4, kv_heads=1, layers=2)
        check(device, case, sm_count=32)


@KERNELS
def test_layers_share_one_schedule(device):
    """The last part of a layer puts its ticket back for the next layer."""
    check(device, AttentionCase((600,), layers=3), sm_count=32)


@KERNELS
def test_more_requests_than_fit_one_wave(device):
    check(device, AttentionCase((130, 1, 64, 0, 700, 9, 33), block=4, heads=4), sm_count=2)


@KERNELS
def test_the_result_does_not_depend_on_the_order_of_threads(device):
    case = AttentionCase((500,))
    first, second = (attend(device, case, seed, sm_count=32) for seed in (1, 2))
    assert torch.equal(first, second)


@KERNELS
@pytest.mark.parametrize("scheduled_lens", [(20, 900), (500, 20, 900), (900,)], ids=str)
def test_a_schedule_of_other_lengths_or_another_batch_costs_no_correctness(device, scheduled_lens):
    """Parts come from the schedule, tiles from the lengths that the attention kernel sees.

    A schedule of another batch has the same size, so that no check of shapes tells: its header
    does.
    """
    case = AttentionCase((500, 20), layers=2)
    check(device, case, sm_count=32, scheduled_lens=scheduled_lens)


@DEVICES
@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize("logit_scale", [1.0, 8.0])
def test_is_not_less_accurate_than_pytorch(device, narrow, logit_scale):
    """At most 1.5 times the error of the op's plain PyTorch reference in the same type."""
    case = AttentionCase((300, 50), dtype=DTYPES[device][narrow], logit_scale=logit_scale)
    x = case.inputs()
    reference = case.call(ops.block_attention_reference, x | {"qkv": x["qkv"][0]})
    allowed = 1.5 * case.error(reference[None], tensor_cores=device != "cpu")
    assert attention_error(device, case, sm_count=32) <= allowed


@DTYPES_AND_SIZES
@settings(max_examples=16, deadline=None)
@given(data=st.data())
def test_any_shape(device, dtype, head_dims, data):
    """On the emulator under any thread schedule."""
    draw, cpu = data.draw, device == "cpu"
    kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from(head_dims))
    case = AttentionCase(
        lens=tuple(draw(st.lists(st.integers(0, 400), min_size=1, max_size=5))),
        block=draw(st.integers(1 if cpu else 2, 32)),
        heads=kv_heads * draw(st.integers(1, 16 // kv_heads)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary=draw(st.sampled_from([head_dim // 4, head_dim // 2, head_dim, *([0, 2] * cpu)])),
        dtype=dtype,
        page=draw(st.sampled_from([1, 3, 16, 64])),
        window=draw(st.just(-1) | st.integers(0, 300)),
        causal=draw(st.booleans()),
        logit_scale=draw(st.sampled_from([0.25, 1.0, 8.0])),
        lens_64bit=draw(st.booleans()),
        layers=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**20)),
    )
    check(device, case, draw(st.integers(0, 2**20)), sm_count=draw(st.integers(1, 40)))


@DEVICES
def test_a_window_leaves_out_pool_slots_before_it_and_writes_none(device):
    """Slots that no query sees may have been freed: NaN there must not reach the output."""
    case = AttentionCase((300,), window=40, causal=True)
    x = case.inputs()
    freed = x["req_to_token"][x["req_pool_indices"][0], : 300 - 40].long()
    for name in ("k_pool", "v_pool"):
        x[name][freed] = torch.nan
    before = x["k_pool"].clone()
    out = attend(device, case, x=x)
    assert case.error(out) < ATTENTION_TOLERANCE[case.dtype]
    assert torch.equal(x["k_pool"].nan_to_num(), before.nan_to_num())


@DEVICES
def test_a_nan_in_the_context_reaches_the_output_of_its_request_alone(device):
    case = AttentionCase((20, 30), block=8)
    x = case.inputs()
    slot = x["req_to_token"][x["req_pool_indices"][1], 7]
    x["v_pool"][slot] = torch.nan
    (out,) = attend(device, case, x=x)
    assert out[:8].isfinite().all() and out[8:].isnan().all()


@DEVICES
def test_an_empty_batch_gives_an_empty_result(device):
    assert attend(device, AttentionCase(())).shape == (1, 0, 8 * 128)


@pytest.mark.parametrize("lens", [(0,), (100,), (1000,), (5, 2000, 64)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads_gives_the_reference_result(lens, count):
    with threads(count):
        check("cpu", AttentionCase(lens, dtype=F32))


@pytest.mark.parametrize("device", [CUDA])
def test_a_graph_follows_the_lengths_of_each_replay(device):
    """Captured once, replayed for other lengths, tables and rows: nothing depends on the host."""
    cases = [AttentionCase((700, 3000), seed=seed) for seed in range(3)]
    cases += [replace(cases[0], lens=lens) for lens in ((0, 3000), (3000, 1), (17, 64))]
    inputs = [{n: t.cuda() for n, t in case.inputs().items()} for case in cases]
    slots = max(x["k_pool"].shape[0] for x in inputs)
    static = {name: tensor.clone() for name, tensor in inputs[0].items()}
    for name in ("k_pool", "v_pool"):
        static[name] = inputs[0][name].new_full((slots, *inputs[0][name].shape[1:]), torch.nan)

    def step() -> torch.Tensor:
        schedule = cases[0].schedule(static)
        for _ in range(2):
            # As in a drafter, the kernel before the attention writes its qkv.
            x = static | {"qkv": static["qkv"][0].clone()}
            out = cases[0].call(ops.block_attention, x, schedule=schedule)
        return out

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
            if name == "req_to_token":
                static[name][:, : tensor.shape[1]].copy_(tensor)
            else:
                static[name][: tensor.shape[0]].copy_(tensor)
        out.fill_(torch.nan)
        graph.replay()
        assert case.error(out[None].cpu()) < ATTENTION_TOLERANCE[case.dtype]
