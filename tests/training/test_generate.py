"""The batched generator says what transformers says one prompt at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_causal_lm

from dflare.errors import UnsupportedError
from dflare.training.data.generate import Generator, Sampling, by_length, sample
from dflare.training.data.slot_cache import ATTENTION, grouped_attention
from dflare.training.data.target import Target, load_target

STOP = (2, 7, 11, 19)


@pytest.fixture(scope="module", params=[8, 16], ids=["head8", "head16"])
def head_dim(request):
    """A decoding step reads heads of 16 by the operator of paged attention, those of 8 not."""
    return request.param


@pytest.fixture(scope="module")
def target(head_dim):
    model = tiny_causal_lm(head_dim=head_dim)
    model.set_attn_implementation(ATTENTION)
    return Target(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_target_says_what_transformers_says(tmp_path, dtype):
    """On a CPU its linear layers and norms run on our kernels."""
    model = tiny_causal_lm()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        exact = model(ids).logits
        plain = model.to(dtype)(ids).logits
        model.save_pretrained(tmp_path)
        loaded = load_target(str(tmp_path), dtype=dtype).model(ids).logits
    assert loaded.dtype == dtype
    off = (loaded - exact).square().mean().sqrt()
    assert off <= 1.3 * (plain - exact).square().mean().sqrt() + 1e-5


def greedy(model, prompt, max_new_tokens, max_length):
    """The same answer without any cache."""
    ids = list(prompt)
    end = min(len(prompt) + max_new_tokens, max_length)
    with torch.no_grad():
        while len(ids) < end and not (len(ids) > len(prompt) and ids[-1] in STOP):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@settings(deadline=None, max_examples=6)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=5),
    rows=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_answers_equal_greedy_decoding_of_each_prompt_alone(target, head_dim, lengths, rows, seed):
    torch.manual_seed(seed)
    prompts = [torch.randint(64, (n,)).tolist() for n in lengths]
    generator = Generator(target, rows, 20, Sampling(max_new_tokens=8, stop_ids=STOP))
    answers = {answer.prompt: answer for answer in generator.run(prompts)}
    assert sorted(answers) == list(range(len(prompts)))
    plain = tiny_causal_lm(head_dim=head_dim)
    for index, prompt in enumerate(prompts):
        expected = greedy(plain, prompt, 8, 20)
        assert answers[index].ids == expected
        assert answers[index].finish == ("stop" if expected[-1] in STOP else "length")
    assert generator.generated == sum(len(answer.ids) for answer in answers.values())


def test_prompts_that_leave_no_room_are_skipped(target):
    generator = Generator(target, 2, 8, Sampling(max_new_tokens=4))
    answers = list(generator.run([[1] * 8, [], [5, 6]]))
    assert [answer.prompt for answer in answers] == [2]


def test_a_deadline_ends_the_run(target):
    generator = Generator(target, 1, 64, Sampling(max_new_tokens=60))
    assert list(generator.run([[1, 2]] * 3, deadline=0.0)) == []


def test_the_first_of_the_highest_logits_is_taken():
    torch.manual_seed(0)
    for size in (256, 300):
        logits = torch.randint(9, (50, size)).bfloat16()
        assert torch.equal(sample(logits, 0.0), logits.argmax(-1))


def test_prompts_are_prefilled_with_others_of_their_length():
    """So a fifth of a prefill is padding at most, and no prompt is lost."""
    torch.manual_seed(0)
    prompts = [(n, [1] * int(length)) for n, length in enumerate(torch.randint(1, 200, (60,)))]
    parts = list(by_length(prompts))
    assert sorted(item for part in parts for item in part) == prompts
    for part in parts:
        real = sum(len(ids) for _, ids in part)
        assert real >= 0.8 * len(part) * max(len(ids) for _, ids in part)
    assert len(parts) < 30


def test_samples_follow_the_softmax_and_the_floor():
    torch.manual_seed(0)
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    drawn = sample(logits.expand(200_000, -1), temperature=1.0)
    shares = torch.bincount(drawn, minlength=4) / 200_000
    torch.testing.assert_close(shares, logits.exp(), atol=5e-3, rtol=0)
    drawn = sample(logits.expand(20_000, -1), temperature=1.0, min_p=0.2)
    assert set(drawn.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}])
def test_attention_that_is_not_computed_is_refused(extra):
    qkv = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UnsupportedError, match="--server"):
        grouped_attention(torch.nn.Module(), qkv, qkv, qkv, None, 1.0, **extra)
