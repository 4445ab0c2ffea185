"""A step that proposed nothing accepts by a short way what DFLASH's own operators accept."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2

from dflare.engine import worker
from dflare.engine.worker import DFlareWorker


@pytest.fixture
def step() -> tuple[Any, dict[str, Any]]:
    """A worker at width 1 on the CPU, and what it is given for three requests."""
    made = object.__new__(DFlareWorker)
    made.block_size = 1
    made._selector_sample, made._use_triton_accept_bonus = None, False
    made._tp_sync = SimpleNamespace(sync=lambda *_: None)
    generator = torch.Generator().manual_seed(5)
    return made, {
        "candidates": torch.tensor([[4], [9], [2]]),
        "next_token_logits": torch.randn(3, 11, generator=generator),
        "sampling_info": None,
        "prefix_lens": torch.tensor([7, 1, 30]),
        "bs": 3,
        "draft_input": None,
    }


def as_dflash(made: DFlareWorker, given: dict[str, Any]) -> tuple:
    *accepted, lengths = DFlashWorkerV2._accept_block(made, **given)
    # It leaves the new lengths to its caller.
    assert lengths is None
    return *accepted, given["prefix_lens"] + accepted[1].to(given["prefix_lens"].dtype)


def assert_same(found: tuple, expected: tuple) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_plain_step_accepts_what_dflash_does(step):
    made, given = step
    assert_same(made._accept_block(**given), as_dflash(made, given))


def test_tokens_that_were_sampled_before_are_taken(step):
    made, given = step
    given["target_predict"] = torch.tensor([3, 3, 8])
    assert_same(made._accept_block(**given), as_dflash(made, given))


def test_ranks_agree_on_a_plain_steps_tokens(step):
    made, given = step
    synced = []
    made._tp_sync = SimpleNamespace(sync=lambda _, tokens: synced.append(tokens.fill_(6)))
    _, _, bonus, tokens, _ = made._accept_block(**given)
    assert len(synced) == 1 and bonus.tolist() == [6, 6, 6] and tokens.tolist() == [[6]] * 3


def test_a_simulated_length_goes_the_long_way(step, monkeypatch):
    made, given = step
    monkeypatch.setattr(worker, "SIMULATE_ACC_LEN", 1.0)
    *_, lengths = made._accept_block(**given)
    assert lengths is None
