"""Walks over a table of drafts are what decoding does, for chains and for trees."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import random_drafter, tiny_causal_lm, tiny_draft_config

from dflare.branch import BranchOdds
from dflare.errors import DFlareError
from dflare.training.data.slot_cache import ATTENTION
from dflare.training.data.target import Target
from dflare.training.run import evaluate as evaluation
from dflare.training.run.answers import known_answers
from dflare.training.run.draft_table import DraftTable, draft_table
from dflare.training.run.evaluate import check_by_decoding, compare
from dflare.training.run.look_ups import look_ups
from dflare.training.run.speculate import decode

STOP = (2, 7)


@pytest.fixture(scope="module")
def pair():
    model = tiny_causal_lm()
    model.set_attn_implementation(ATTENTION)
    return Target(model, (0, 1, 2)), random_drafter(tiny_draft_config())


@pytest.fixture(scope="module")
def answers(pair):
    torch.manual_seed(4)
    prompts = [torch.randint(64, (n,)).tolist() for n in (3, 9, 5, 7)]
    return known_answers(pair[0], prompts, 30, STOP, rows=3)


def test_a_walk_over_the_whole_block_is_real_decoding(pair, answers):
    target, drafter = pair
    assert len(answers) >= 3
    steps = []
    for prompt, answer in answers:
        table = draft_table(target, drafter, prompt, answer)
        (real,) = decode(target, drafter, [prompt], 30, STOP)
        assert real.ids == answer and real.emitted == table.chain(4)
        at = 0
        for block, step in zip(real.blocks, real.emitted, strict=True):
            assert table.tokens[at, :, 0].tolist() == block
            at += step
        steps += real.emitted
    assert max(steps) > 1, "no draft was right, so nothing was shown"


def test_decoding_that_differs_from_the_walk_is_an_error(pair, answers, monkeypatch):
    check_by_decoding(*pair, answers, 30, STOP)
    monkeypatch.setattr(DraftTable, "chain", lambda self, width: [1] * 99)
    with pytest.raises(DFlareError, match="prompt 0: decoding adds"):
        check_by_decoding(*pair, answers, 30, STOP)


def table_of(ranks: list[list[int]]) -> DraftTable:
    """Six candidates a slot, two of them with probabilities of 0.6 and 0.3."""
    answer = np.arange(100, 101 + len(ranks))
    shape = (len(ranks), len(ranks[0]), 6)
    tokens = np.arange(math.prod(shape)).reshape(shape)  # others than the answer's
    for anchor, slot in np.argwhere(np.array(ranks) < 6):
        tokens[anchor, slot, ranks[anchor][slot]] = answer[anchor + 1 + slot]
    logs = np.log([0.6, 0.3, 4e-6, 3e-6, 2e-6, 1e-6], dtype=np.float32)
    return DraftTable(answer, tokens, np.tile(logs, (*shape[:2], 1)), np.array(ranks))


def test_chains_and_trees_by_hand():
    # Anchors 0 .. 4 of an answer of six tokens; the second candidate is right at anchor 0.
    table = table_of([[1, 0], [0, 0], [0, 0], [9, 9], [0, 9]])
    assert table.chain(1) == [1] * 5
    assert table.chain(2) == [1, 2, 1, 1]  # anchors 0, 1, 3, 4
    assert table.chain(3) == [1, 3, 1]
    # The nodes in order: 0 (0.6), 0-0 (0.36), 1 (0.3), 0-1 and 1-0 (0.18), 1-1.
    walks = table.tree([2, 3, 4, 6, 7])
    assert walks[2] == table.chain(2) and walks[3] == table.chain(3)
    assert walks[4] == [2, 3]  # 1 is there: anchor 0 keeps one draft
    assert walks[7] == [3, 1, 1]  # 1-0 too


def test_look_ups_by_hand():
    answer = [1, 2, 3, 4, 5, 9]
    table = replace(table_of([[9, 9]] * 5), answer=np.array(answer))
    found = look_ups([1, 2, 3, 4, 5, 6], answer, 4)
    # Behind 1 2 3 came 4 5 6, of which 4 5 are right; anchors 0 and 1 match nothing.
    assert found.match.tolist() == [0, 0, 3, 4, 5] and found.right.tolist() == [0, 0, 2, 1, 0]
    assert found.found[2].tolist() == [4, 5, 6, 1]
    seen = table.compare(found)
    assert seen.agreed[2:].tolist() == [0] * 3 and seen.drafted.tolist() == [0] * 5
    assert table.spliced(3, seen, 3) == [1, 1, 3]
    assert table.spliced(2, seen, 3) == [1, 1, 2, 1]
    assert table.spliced(3, seen, 4) == [1, 1, 1, 2]  # the match of three is too short
    # The drafter's nodes have 0.6 and 0.36, the branch's 0.63 and 0.43.
    branched = table.tree([3, 4], found.branches(BranchOdds()))
    assert branched == {3: [1, 1, 2, 1], 4: [1, 1, 3]}


def test_a_comparison_is_paired_by_prompt():
    """Prompts differ by far more than drafters do; the interval is of the difference alone."""
    rng = np.random.default_rng(0)
    steps = rng.integers(20, 80, size=60)
    tokens = (steps * rng.uniform(1.2, 3.0, size=60)).round()
    better = np.stack([tokens, np.ceil(steps * 0.95)], 1)
    result = compare(better, np.stack([tokens, steps], 1))
    assert result["gain"] == pytest.approx(0.05, abs=0.01)
    low, high = result["interval"]
    assert 0.035 < low < result["gain"] < high < 0.06
    same = compare(better, better)
    assert same == {"gain": 0.0, "interval": [0.0, 0.0]}


def test_every_width_and_tree_comes_from_one_table(pair, answers):
    result = evaluation.evaluate(*pair, answers)
    assert list(result["chain"]) == ["2", "3", "4"]
    chain = list(result["chain"].values())
    assert chain == sorted(chain) and chain[-1] == result["drafter"]["accept_length"]
    tree = list(result["tree"].values())
    assert tree == sorted(tree) and tree[0] >= chain[0]
    assert list(result["tree_and_lookup"]) == list(result["tree"])
    assert list(result["chain_and_lookup"]) == list(result["chain"])
    assert sum(tokens for tokens, _ in result["by_prompt"]) == result["drafter"]["tokens"]
