"""What training measures is what serving gets: the engine and the training code, step by step."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from checkpoints import MASK, VOCAB_SIZE, write_random_target
from demo_answers import FEW_TOKENS as NEW_TOKENS
from engines import proposals, running_engine
from prompts import chat_prompts
from tiny_models import train_config

from dflare.training.data.files import Record, write_records
from dflare.training.data.generate import Generator, Sampling
from dflare.training.data.target import load_target
from dflare.training.drafter.export import load_drafter
from dflare.training.run.loop import train
from dflare.training.run.speculate import decode
from dflare.training.run.trainer import Trainer

pytestmark = pytest.mark.slow


def test_engine_and_training_code_draft_and_accept_alike(demo_pair, demo_tokenizer, whole_blocks):
    drafter = load_drafter(demo_pair[1])
    target = load_target(str(demo_pair[0]), drafter.config.target_layer_ids)
    answers = whole_blocks["chats"]
    prompts = chat_prompts(demo_tokenizer, len(answers))
    expected = decode(target, drafter, prompts, NEW_TOKENS, (demo_tokenizer.eos_token_id,))

    steps = tokens = 0
    for answer, own in zip(answers, expected, strict=True):
        assert answer["output_ids"] == own.ids
        served = [step["block"][1:] for step in proposals(answer["meta_info"]["id"])]
        # The engine may draft once more behind the end.
        assert served[: len(own.blocks)] == own.blocks
        steps += answer["meta_info"]["spec_verify_ct"]
        tokens += len(answer["output_ids"])
    trained = sum(map(sum, (own.emitted for own in expected)))
    measured = trained / sum(len(own.emitted) for own in expected)
    # SGLang counts the first token, which comes from the prompt, with the first step.
    assert (tokens - len(prompts)) / steps == pytest.approx(measured, rel=0.02)


def test_sglang_serves_a_dflash_export_at_the_accept_length_of_training(tmp_path):
    """Stock DFLASH, without this package's worker; the drafter knows one of the two answers."""
    folder = write_random_target(tmp_path / "target")
    prompts = [[5, 6, 7, 8], [40, 41, 42]]
    target = load_target(str(folder), (1, 3, 5))
    (answer,) = Generator(target, 1, 64, Sampling(max_new_tokens=NEW_TOKENS)).run(prompts[:1])
    record = Record(prompts[0] + answer.ids, [(4, 4 + NEW_TOKENS)])
    header = {"target": str(folder), "vocab_size": VOCAB_SIZE}
    write_records(tmp_path / "data.xz", header, [record])
    config = train_config(
        tmp_path,
        drafter__architecture="dflash",
        drafter__taps=[1, 3, 5],
        drafter__mask_token_id=MASK,
        data__held_out=0,
        data__anchors=30,
        optimizer__learning_rate=5e-3,
        run__steps=150,
    )
    train(Trainer(config, target))
    draft = tmp_path / "run" / "drafter"
    expected = decode(target, load_drafter(draft), prompts, NEW_TOKENS, ())
    assert expected[0].emitted[:5] == [4] * 5 and sum(expected[1].emitted[:5]) < 20

    with running_engine(
        folder, speculative_algorithm="DFLASH", speculative_draft_model_path=str(draft)
    ) as engine:
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        answers = [engine.generate(input_ids=ids, sampling_params=sampling) for ids in prompts]
    for answered, own in zip(answers, expected, strict=True):
        assert answered["output_ids"] == own.ids
        assert answered["meta_info"]["spec_verify_ct"] == len(own.emitted)
