"""Two ranks over gloo on the CPU give the tokens of one, and the same drafts."""

import os

import pytest
from checkpoints import write_random_draft
from engines import running_engine
from reference_drafter import ReferencePair
from test_same_drafts import check, random_prompts

pytestmark = pytest.mark.slow


TWO_CORES = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")


@TWO_CORES
@pytest.mark.parametrize(
    ("page_size", "drafted"), [(16, 200), pytest.param(1, None, marks=pytest.mark.long)]
)
def test_two_ranks_draft_like_one(random_pair, tmp_path, page_size, drafted):
    """Drafts are taken from 200 tokens, which lie on both ranks, or from the vocabulary."""
    prompts = random_prompts(3, 5, 80)
    draft = write_random_draft(tmp_path / "draft", draft_vocab_size=drafted)
    reference = ReferencePair(random_pair[0], draft)
    with running_engine(random_pair[0], draft, page_size=page_size, tp_size=2) as engine:
        check(engine, reference, prompts, 24, f"tp-{page_size}")
        sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
        two = [
            a["output_ids"] for a in engine.generate(input_ids=prompts, sampling_params=sampling)
        ]
    with running_engine(random_pair[0], page_size=page_size) as engine:
        one = [
            a["output_ids"] for a in engine.generate(input_ids=prompts, sampling_params=sampling)
        ]
    assert two == one


@TWO_CORES
@pytest.mark.parametrize("drafted", [None, pytest.param(200, marks=pytest.mark.long)])
def test_two_ranks_grow_the_trees_of_one(random_pair, tmp_path, drafted):
    """Step by step as many tokens, from the vocabulary that lies on both ranks or from 200."""
    draft = write_random_draft(tmp_path / "draft", draft_vocab_size=drafted)
    turns = (("tree", 8), 3, ("tree", 5), ("lookup", 2))
    sampling = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    runs = []
    for ranks in (1, 2):
        with running_engine(random_pair[0], draft, turns, tp_size=ranks) as engine:
            # One after the other, so that arms fall on the same steps.
            answers = [
                engine.generate(input_ids=ids * 2, sampling_params=sampling)
                for ids in random_prompts(4, 20, 60)
            ]
        accepted = [a["meta_info"]["spec_correct_drafts_histogram"] for a in answers]
        runs.append(([a["output_ids"] for a in answers], accepted))
    assert runs[0] == runs[1]
    assert sum(sum(steps[1:]) for steps in accepted) > 0, "nothing was accepted"
