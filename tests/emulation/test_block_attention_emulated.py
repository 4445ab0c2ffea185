"""block_attention and its schedule, run by the emulator, against float64."""

import pytest
import torch
from emulated_ops import attention_error, attention_output
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import AttentionCase

from dflare.ops import block_attention_reference

# Of a head of a token, by element type: probabilities and the result are rounded once each.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3}


def check(case: AttentionCase, seed: int = 0, sm_count: int = 4) -> None:
    assert attention_error(case, seed, sm_count=sm_count) < TOLERANCE[case.dtype]


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
        AttentionCase((100,), rotary=32, lens_64bit=False),
        AttentionCase((100,), heads=6, kv_heads=6, block=2),  # one query head a group, few rows
        AttentionCase((100,), heads=16, kv_heads=1, block=5),  # 80 rows: the 8-warp kernel
        AttentionCase((40,), heads=16, kv_heads=1, block=32),  # 512 rows: four tiles
    ],
    ids=str,
)
def test_equals_float64(case: AttentionCase) -> None:
    check(case)


def test_large_logits_neither_overflow_nor_lose_the_maximum() -> None:
    # One bit of a rounded query moves such a logit by 0.05: no tighter bound could hold.
    assert attention_error(AttentionCase((150,), logit_scale=100.0)) < 5e-2


def test_parts_with_large_logits_are_merged_without_losing_the_maximum() -> None:
    """Three parts whose maxima lie far apart, in the type with the narrow exponent."""
    check(AttentionCase((600,), logit_scale=100.0, dtype=torch.float16), sm_count=32)


def test_a_long_context_is_cut_into_parts_and_merged() -> None:
    check(AttentionCase((3000,), block=4, heads=4, kv_heads=1), sm_count=32)


def test_layers_share_one_schedule() -> None:
    """The last part of a layer puts its ticket back for the next layer."""
    check(AttentionCase((600,), layers=3), sm_count=32)


def test_more_requests_than_fit_one_wave() -> None:
    check(AttentionCase((130, 1, 64, 0, 700, 9, 33), block=4, heads=4), sm_count=2)


def test_the_result_does_not_depend_on_the_order_of_threads() -> None:
    case = AttentionCase((500,))
    first, second = (attention_output(case, seed, sm_count=32) for seed in (1, 2))
    assert torch.equal(first, second)


def test_a_schedule_of_other_lengths_costs_no_correctness() -> None:
    """Parts come from the schedule, tiles from the lengths that the attention kernel sees."""
    case = AttentionCase((500, 20), layers=2)
    assert attention_error(case, sm_count=32, scheduled_lens=(20, 900)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("scheduled_lens", [(500, 20, 900), (900,)], ids=str)
def test_a_schedule_of_another_batch_costs_no_correctness(scheduled_lens: tuple[int, ...]) -> None:
    """It has the same size, so that no check of shapes tells: its header does."""
    case = AttentionCase((500, 20), layers=2)
    assert attention_error(case, sm_count=32, scheduled_lens=scheduled_lens) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_not_less_accurate_than_pytorch(dtype: torch.dtype) -> None:
    """At most 1.5 times the error of the op's plain PyTorch reference in the same type."""
    case = AttentionCase((300, 50), dtype=dtype)
    x = case.inputs()
    reference = block_attention_reference(*case.arguments(x, x["qkv"][0]))
    assert attention_error(case, sm_count=32) <= 1.5 * case.error(reference[None])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=16, deadline=None)
@given(data=st.data())
def test_any_shape_under_any_thread_schedule(
    dtype: torch.dtype, head_dim: int, data: st.DataObject
) -> None:
    draw = data.draw
    kv_heads = draw(st.integers(1, 3))
    case = AttentionCase(
        lens=tuple(draw(st.lists(st.integers(0, 400), min_size=1, max_size=5))),
        block=draw(st.integers(2, 32)),
        heads=kv_heads * draw(st.integers(1, 16 // kv_heads)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary=draw(st.sampled_from([head_dim // 4, head_dim // 2, head_dim])),
        dtype=dtype,
        page=draw(st.sampled_from([1, 3, 16, 64])),
        window=draw(st.just(-1) | st.integers(0, 300)),
        causal=draw(st.booleans()),
        logit_scale=draw(st.sampled_from([0.25, 1.0, 8.0])),
        lens_64bit=draw(st.booleans()),
        layers=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**20)),
    )
    check(case, seed=draw(st.integers(0, 2**20)), sm_count=draw(st.integers(1, 40)))
