"""A draft vocabulary: the most frequent tokens of the answers, in the checkpoint and in drafts."""

import numpy as np
import pytest
import torch
from checkpoints import random_draft_config, random_tensors, write_random_draft, write_tensors
from safetensors.torch import load_file
from tiny_models import random_drafter, tiny_causal_lm, tiny_draft_config
from typer.testing import CliRunner

from dflare.checkpoint import check_finite, read_config
from dflare.cli.app import app
from dflare.errors import CheckpointError
from dflare.training.data.files import Record, write_records
from dflare.training.data.slot_cache import ATTENTION
from dflare.training.data.target import Target
from dflare.training.drafter.draft_vocabulary import write_draft_vocabulary
from dflare.training.drafter.export import export_drafter, load_drafter
from dflare.training.errors import ConfigError
from dflare.training.run.answers import known_answers
from dflare.training.run.draft_table import draft_table
from dflare.training.run.speculate import decode


@pytest.fixture
def data(tmp_path):
    """Tokens 9, 7 and 8 in answers, nine, five and two times; 3 in a prompt."""
    record = Record([3] * 20 + [9] * 9 + [7] * 5 + [8] * 2, [(20, 36)])
    header = {"target": "none", "vocab_size": 512}
    write_records(tmp_path / "data.xz", header, [record])
    return tmp_path / "data.xz"


def test_the_most_frequent_tokens_of_answers_are_drafted(tmp_path, data):
    draft = write_random_draft(tmp_path / "draft")
    arguments = ["draft-vocab", str(draft), str(tmp_path / "small"), "--data", str(data)]
    result = CliRunner().invoke(app, [*arguments, "--size", "2"])
    assert "drafts 2 tokens, 87.50% of what the answers hold" in result.stdout
    before, after = (load_file(f / "model.safetensors") for f in (draft, tmp_path / "small"))
    assert after.pop("d2t").tolist() == [7, 9 - 1]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_drafter(tmp_path / "small").draft_ids.tolist() == [7, 9]
    check_finite(tmp_path / "small", read_config(tmp_path / "small"))


@pytest.mark.parametrize("size", [0, 4])
def test_no_more_tokens_than_were_seen(tmp_path, data, size):
    draft = write_random_draft(tmp_path / "draft")
    with pytest.raises(ConfigError, match=f"--size is {size}, expected 1 to 3"):
        write_draft_vocabulary(draft, tmp_path / "small", [data], size)


@pytest.mark.parametrize("ids", [[5, 5], [9, 7], [-1, 3], [3, 512]], ids=str)
def test_ids_that_are_not_the_targets_are_refused(tmp_path, ids):
    config = random_draft_config(draft_vocab_size=2)
    write_random_draft(tmp_path, config=config)
    rows = torch.tensor(ids) - torch.arange(2)
    write_tensors(tmp_path, random_tensors(config) | {"d2t": rows})
    with pytest.raises(CheckpointError, match="expected ids from 0 to 511 that increase"):
        check_finite(tmp_path, config)


def test_other_tokens_are_never_drafted_and_decoding_is_the_walk(tmp_path):
    model = tiny_causal_lm()
    model.set_attn_implementation(ATTENTION)
    target = Target(model, (0, 1, 2))
    ids = torch.arange(0, 64, 3)
    drafter = random_drafter(tiny_draft_config(draft_vocab_size=len(ids)))
    drafter.draft_ids = ids
    drafter = load_drafter(export_drafter(drafter, drafter.state_dict(), tmp_path / "draft"))
    torch.manual_seed(4)
    prompts = [torch.randint(64, (n,)).tolist() for n in (3, 9, 5, 7)]
    tokens = []
    for prompt, answer in known_answers(target, prompts, 30, (2,)):
        (real,) = decode(target, drafter, [prompt], 30, (2,))
        table = draft_table(target, drafter, prompt, answer)
        assert real.ids == answer and real.emitted == table.chain(4)
        tokens += [token for block in real.blocks for token in block]
        assert np.isin(table.tokens[..., : len(ids)], ids).all()
    assert set(tokens) <= set(ids.tolist()) and len(set(tokens)) > 1
