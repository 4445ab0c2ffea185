"""What training measures is what serving gets: the engine and the training code, step by step."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from engines import proposals, running_engine
from prompts import chat_prompts
from transformers import AutoTokenizer

from dflare.demo import demo_draft, demo_target
from dflare.training.export import load_drafter
from dflare.training.speculate import decode
from dflare.training.target import load_target

pytestmark = pytest.mark.slow
NEW_TOKENS = 40


def test_engine_and_training_code_draft_and_accept_alike():
    folder, draft = demo_target(), demo_draft()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = chat_prompts(tokenizer, 10)
    drafter = load_drafter(draft)
    target = load_target(str(folder), drafter.config.target_layer_ids)
    stop = (tokenizer.eos_token_id,)
    expected = decode(target, drafter, prompts, NEW_TOKENS, stop)

    rids = [f"training-{number}" for number in range(len(prompts))]
    with running_engine(folder, draft, widths="off") as engine:
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
        answers = engine.generate(input_ids=prompts, sampling_params=sampling, rid=rids)

    steps = tokens = 0
    for answer, rid, own in zip(answers, rids, expected, strict=True):
        assert answer["output_ids"] == own.ids
        served = [step["block"][1:] for step in proposals(rid)]
        # The engine may draft once more behind the end.
        assert served[: len(own.blocks)] == own.blocks
        steps += answer["meta_info"]["spec_verify_ct"]
        tokens += len(answer["output_ids"])
    trained = sum(map(sum, (own.emitted for own in expected)))
    measured = trained / sum(len(own.emitted) for own in expected)
    # SGLang counts the first token, which comes from the prompt, with the first step.
    assert (tokens - len(prompts)) / steps == pytest.approx(measured, rel=0.02)
