"""`dflare evaluate` from files: which drafters it takes, and which pairs it refuses."""

import json

import pytest
import torch
from checkpoints import random_draft_config, write_random_draft, write_random_target
from safetensors.torch import load_file, save_file
from tiny_models import random_drafter

from dflare.errors import CheckpointError
from dflare.training.data.generate import Answer
from dflare.training.data.prompts import encode
from dflare.training.data.target import load_target, load_tokenizer
from dflare.training.drafter.export import export_drafter, load_drafter
from dflare.training.run import answers as answers_of
from dflare.training.run import evaluation_run
from dflare.training.run.evaluation_run import run_evaluation


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_random_target(tmp_path_factory.mktemp("target"))


def evaluate(draft, target, folder, **options):
    (folder / "questions.txt").write_text("what is a fish\nwho are you\n")
    return run_evaluation(
        str(draft),
        str(target),
        [folder / "questions.txt"],
        None,
        folder,
        max_new_tokens=6,
        temperature=0.0,
        limit=None,
        rows=2,
        device="cpu",
        **options,
    )


def write_dflash(folder):
    drafter = random_drafter(random_draft_config(), architecture="dflash")
    return export_drafter(drafter, drafter.state_dict(), folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 300}, "vocabulary: the drafter's is 300 and the target's is 512"),
        ({"hidden_size": 32}, "hidden size: the drafter's is 32 and the target's is 64"),
        ({"num_target_layers": 6}, "target layers: the drafter's is 6 and the target's is 8"),
    ],
)
def test_a_drafter_of_another_target_is_refused(target, tmp_path, changes, named):
    draft = write_random_draft(tmp_path / "draft", **changes)
    with pytest.raises(CheckpointError, match=named):
        evaluate(draft, target, tmp_path)


@pytest.mark.parametrize("write", [write_random_draft, write_dflash])
def test_drafters_of_both_architectures_are_measured(target, tmp_path, write):
    report = evaluate(write(tmp_path / "draft"), target, tmp_path)
    score = report["questions"]["drafter"]
    assert score["tokens"] >= score["steps"] > 0
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report


def test_two_drafters_are_compared_on_the_same_answers(target, tmp_path, capsys):
    drafts = [write_random_draft(tmp_path / "a"), write_dflash(tmp_path / "b")]
    report = evaluate(drafts[0], target, tmp_path, against=str(drafts[1]), check=2)
    low, high = report["questions"]["against"]["interval"]
    assert low <= report["questions"]["against"]["gain"] <= high
    assert "against" in capsys.readouterr().out
    itself = evaluate(drafts[1], target, tmp_path, against=str(drafts[1]))
    assert itself["questions"]["against"]["interval"] == [0.0, 0.0]


def test_turns_are_answered_one_after_the_other_and_the_last_is_measured(target):
    """By the target itself, not as user turns in a row; prompts of one turn stay as they are."""
    tokenizer, model = load_tokenizer(str(target)), load_target(str(target))
    turns = [{"role": "user", "content": text} for text in ("hello", "and now?")]
    ((prompt, _),) = answers_of.answered(model, tokenizer, [turns[:1]], 6, ())
    assert prompt == encode(tokenizer, turns[:1])
    said = tokenizer("I am well", add_special_tokens=False)["input_ids"]
    answers = iter([said, said[:4]])

    class Says:
        def __init__(self, *arguments): ...

        def run(self, prompts, deadline=None):
            for number, _ in enumerate(prompts):
                yield Answer(number, next(answers), "length")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers_of, "Generator", Says)
        ((prompt, answer),) = answers_of.answered(model, tokenizer, [turns], 6, ())
    own = {"role": "assistant", "content": "I am well"}
    assert prompt == encode(tokenizer, [turns[0], own, turns[1]]) and answer == said[:4]


def test_the_targets_template_is_told_what_it_is_told_in_serving(target, tmp_path):
    draft = write_random_draft(tmp_path / "draft")
    tokenizer = load_tokenizer(str(target))
    asked = []

    def answered(model, tokenizer, prompts, *how):
        asked.append(encode(tokenizer, prompts[0], how[-1]))
        return answers_of.known_answers(model, asked[-1:], 6, ())

    text = "{{ messages[0]['content'] }}{% if not enable_thinking %} thought{% endif %}"
    tokenizer.chat_template = text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_run, "answered", answered)
        patch.setattr(evaluation_run, "load_tokenizer", lambda _: tokenizer)
        for thinking in ("true", "false"):
            evaluate(draft, target, tmp_path, template=f'{{"enable_thinking": {thinking}}}')
    plain, thought = (tokenizer.decode(ids) for ids in asked)
    assert thought == plain + " thought"


def test_a_broken_dflash_drafter_is_described(tmp_path):
    folder = write_dflash(tmp_path / "draft")
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    tensors |= {"fc.weight": torch.zeros(64, 64), "bias": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_drafter(folder)
    for part in ("missing tensors: norm.weight", "unknown tensors: bias", "[64, 192]"):
        assert part in str(error.value)
