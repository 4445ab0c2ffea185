"""Speculative decoding says what the target alone says, and counts what it accepts."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_drafter, tiny_causal_lm, tiny_draft_config

from dflare.training.data.generate import Generator, Sampling
from dflare.training.data.slot_cache import ATTENTION
from dflare.training.data.target import Target
from dflare.training.run.answers import known_answers
from dflare.training.run.evaluate import Score, evaluate
from dflare.training.run.evaluation_run import write_report
from dflare.training.run.prompt_lookup import propose, simulate
from dflare.training.run.speculate import decode

STOP = (2, 7, 11, 19)


def make_target() -> Target:
    model = tiny_causal_lm()
    model.set_attn_implementation(ATTENTION)
    return Target(model, (0, 1, 2))


@settings(deadline=None, max_examples=6)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_answers_are_those_of_the_target_alone(lengths, seed):
    torch.manual_seed(seed)
    prompts = [torch.randint(64, (n,)).tolist() for n in lengths]
    target = make_target()
    drafter = random_drafter(tiny_draft_config())
    answers = decode(target, drafter, prompts, 10, STOP)
    plain = {
        a.prompt: a.ids for a in Generator(target, 4, 32, Sampling(0.0, 0.0, 10, STOP)).run(prompts)
    }
    for index, answer in enumerate(answers):
        assert answer.ids == plain[index]
        assert sum(answer.emitted) == len(answer.ids) - 1
        # Each step's count is the drafts that agree with the answer, and one more.
        done = 1
        for step, block in zip(answer.emitted, answer.blocks, strict=True):
            left = answer.ids[done:]
            agreeing = 0
            while agreeing < min(3, len(left)) and block[agreeing] == left[agreeing]:
                agreeing += 1
            assert step == min(agreeing + 1, len(left))
            done += step
        assert done == len(answer.ids)


def test_blocks_are_drafted_from_committed_context_alone():
    """Every block proposed while decoding equals the one drafted afresh from the whole text."""
    torch.manual_seed(1)
    target, drafter = make_target(), random_drafter(tiny_draft_config())
    prompt = torch.randint(64, (9,)).tolist()
    (answer,) = decode(target, drafter, [prompt], 16, ())
    text = prompt + answer.ids
    taps = target.read(torch.tensor([text])).taps
    done = 1
    for step, block in zip(answer.emitted, answer.blocks, strict=True):
        n0 = len(prompt) + done - 1
        context = drafter.context_kv(taps[:, :n0], torch.arange(n0)[None])
        tokens = torch.tensor([[text[n0], 3, 3, 3]])
        positions = torch.arange(n0, n0 + 4)[None]
        with torch.no_grad():
            hidden = drafter.draft(target.embed(tokens), positions, context, {-1: None})
        assert (hidden[0, 1:] @ target.head.T).argmax(-1).tolist() == block
        done += step


def test_prompt_lookup_continues_after_the_last_match():
    assert propose([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 2) == [8, 1]
    assert propose([5, 6, 7], 3) == []
    assert propose([4, 4], 3) == [4]


def test_prompt_lookup_steps_by_hand():
    # After 1 2 comes 3 (drafted 3 4 5 from the prompt): accepts 3 4, corrects 5 to 9, then nothing.
    assert simulate([1, 2, 3, 4, 5, 1], [2, 3, 4, 9, 8], drafted=3) == [3, 1]


def test_scores_by_hand(tmp_path):
    score = Score.of([[1, 3], [4]], block_size=4).to_dict()
    assert score == {
        "accept_length": 2.6667,
        "steps": 3,
        "tokens": 8,
        "reached": [0.6667, 0.6667, 0.3333],
        "histogram": [1, 0, 1, 1],
    }


def test_a_report_has_numbers_and_a_plot(tmp_path):
    torch.manual_seed(2)
    prompts = [torch.randint(64, (5,)).tolist() for _ in range(3)]
    drafter = random_drafter(tiny_draft_config())
    answers = known_answers(make_target(), prompts, 8, STOP, rows=2)
    result = evaluate(make_target(), drafter, answers) | {"temperature": 0.0}
    write_report({"questions": result}, tmp_path)
    loaded = json.loads((tmp_path / "evaluation.json").read_text())["questions"]
    assert (
        loaded["prompts"] == len(answers)
        and loaded["drafter"]["tokens"] == loaded["prompt_lookup"]["tokens"]
    )
    assert (tmp_path / "evaluation.png").stat().st_size > 1000


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_with_temperature_have_the_length_asked_for(temperature):
    torch.manual_seed(3)
    (answer,) = decode(
        make_target(), random_drafter(tiny_draft_config()), [[5, 6]], 12, (), temperature
    )
    assert len(answer.ids) == 12
