"""Whose tokens penalties count: by request, from its first step here to its last."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dflare.engine.penalties import Penalties

pytestmark = pytest.mark.slow  # imports SGLang

VOCAB = 20


@dataclass(eq=False)
class Request:
    """As much of SGLang's `Req` as penalties look at."""

    row: int
    output_ids: list[int] = field(default_factory=list)
    retraction_count: int = 0
    frequency_penalty: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self):
        self.kv = SimpleNamespace(req_pool_idx=self.row)
        self.eos_token_ids = {2}
        self.tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=2)
        self.sampling_params = SimpleNamespace(
            frequency_penalty=self.frequency_penalty,
            presence_penalty=0.25,
            repetition_penalty=1.5,
            min_new_tokens=self.min_new_tokens,
            stop_token_ids=None,
        )


def batch(*reqs: Request, prefill: bool = False, decoding: tuple[Request, ...] = ()) -> Any:
    mode = SimpleNamespace(is_extend=lambda: prefill)
    return SimpleNamespace(
        reqs=reqs, forward_mode=mode, is_extend_in_batch=prefill, decoding_reqs=list(decoding)
    )


@pytest.fixture
def penalties() -> Penalties:
    return Penalties(VOCAB, "cpu")


def prefill(penalties, tokens, *reqs, decoding=()):
    chosen = penalties.select(batch(*reqs, prefill=True, decoding=decoding))
    penalties.commit_prefill(chosen, torch.tensor(tokens))


def decode(penalties, tokens, *reqs):
    """A step of width 1 that commits one token a request."""
    chosen = penalties.select(batch(*reqs))
    penalties.commit(chosen, torch.tensor(tokens)[:, None], torch.ones(len(reqs)))


def counts(penalties, req) -> dict[int, int]:
    """Recovered from the logits: they fall by 1 a repetition and 0.25 once, then are scaled."""
    penalised = torch.full((1, VOCAB), -10.0)
    penalties.apply(penalties.select(batch(req)), penalised, torch.tensor([[0]]))
    lower = (-penalised[0] / 1.5 - 10.25).tolist()
    return {token: round(n) for token, n in enumerate(lower) if n > 0.5}


def test_a_request_that_decodes_on_in_a_mixed_batch_keeps_its_counts(penalties):
    """Under overlap scheduling the host knows its last token one step later."""
    old, new = Request(0), Request(1)
    prefill(penalties, [5], old)
    decode(penalties, [6], old)  # the host has seen neither token yet
    prefill(penalties, [9, 7], new, old, decoding=(old,))
    assert counts(penalties, old) == {5: 1, 6: 1, 7: 1}
    assert counts(penalties, new) == {9: 1}


def test_a_request_prefilled_elsewhere_starts_from_what_it_has_generated(penalties):
    """As a disaggregated decode server gets it, and one restored from the host: no prefill."""
    gone = Request(0)
    prefill(penalties, [5], gone)
    arrived = Request(0, output_ids=[8, 8, 3])
    decode(penalties, [4], arrived)
    assert counts(penalties, arrived) == {8: 2, 3: 1, 4: 1}


def test_a_restored_request_in_a_mixed_batch_starts_too(penalties):
    restored = Request(0, output_ids=[8], retraction_count=1)
    prefill(penalties, [4], restored, decoding=(restored,))
    assert counts(penalties, restored) == {8: 1, 4: 1}


def test_a_retracted_request_counts_what_the_host_knows(penalties):
    """The token of the step in flight was dropped when it was retracted."""
    req = Request(0)
    prefill(penalties, [5], req)
    decode(penalties, [6], req)
    req.output_ids, req.retraction_count = [5], 1
    decode(penalties, [7], req)
    assert counts(penalties, req) == {5: 1, 7: 1}


def test_chunks_before_the_last_leave_nothing_behind(penalties):
    req = Request(0)
    for unreal in ([11], [12]):
        prefill(penalties, unreal, req)
    prefill(penalties, [5], req)
    assert counts(penalties, req) == {5: 1}


def test_the_token_after_a_prefill_is_penalised_too(penalties):
    """A retracted request has generated before; one that is new has not."""
    back = Request(0, output_ids=[5, 5, 6], min_new_tokens=4)
    new = Request(1)
    free = replace(new, row=2, frequency_penalty=0.0)
    free.sampling_params.presence_penalty, free.sampling_params.repetition_penalty = 0, 1
    info = SimpleNamespace(
        penalizer_orchestrator="sglang's", acc_additive_penalties=None, acc_scaling_penalties=None
    )
    info_of_three = type("Info", (SimpleNamespace,), {"__len__": lambda _: 3})(**vars(info))
    chosen = penalties.select(batch(free, back, new, prefill=True))
    with penalties.in_prefill(chosen, info_of_three):
        assert info_of_three.penalizer_orchestrator is None
        additive = info_of_three.acc_additive_penalties
        scaling = info_of_three.acc_scaling_penalties
    assert vars(info_of_three) == vars(info)
    assert not additive[[0, 2]].any() and (scaling[[0, 2]] == 1).all()
    expected = {5: -2.25, 6: -1.25, 2: float("-inf")}
    assert additive[1].tolist() == [expected.get(token, 0.0) for token in range(VOCAB)]
    assert scaling[1].tolist() == [1.5 if token in (5, 6) else 1.0 for token in range(VOCAB)]


def test_penalties_end_with_the_step(penalties):
    """Without overlap scheduling the next step, of other requests, has the same sampling info."""
    from dflare.engine.hooks import _apply_penalties_first

    req, info = Request(0), SimpleNamespace()
    prefill(penalties, [5], req)

    def adjusted():
        logits = torch.ones(2, VOCAB)
        _apply_penalties_first(
            lambda **_: None, next_token_logits=logits, sampling_info=info, draft_token_num=2
        )
        return logits

    block = torch.tensor([[5, 6], [0, 0]])
    chosen = penalties.select(batch(req))
    with penalties.in_verification(chosen, info, lambda: (block, None)):
        assert (adjusted()[:, 5] < 0).all()
    assert (adjusted() == 1).all()


def test_a_node_is_penalised_for_its_own_ancestors_alone(penalties):
    """As the last position of a chain of them is."""
    penalised, free = Request(0, output_ids=[5], min_new_tokens=4), Request(1)
    prefill(penalties, [9, 7], penalised, free)
    chosen = penalties.select(batch(penalised, free))
    parents = [-1, 0, 0, 1, 1, 2, 4]
    tokens = [[9, 5, 6, 5, 9, 3, 6], [7, 3, 4, 3, 8, 4, 3]]
    logits = torch.linspace(-3, 3, 2 * 7 * VOCAB).view(14, VOCAB)
    out = logits.clone()
    penalties.apply(chosen, out, torch.tensor(tokens), torch.tensor([parents] * 2).int())
    for node in range(7):
        path = [node]
        while path[0]:
            path.insert(0, parents[path[0]])
        alone = logits.view(2, 7, VOCAB)[:, path].reshape(-1, VOCAB).clone()
        chain = torch.tensor([[row[i] for i in path] for row in tokens])
        penalties.apply(chosen, alone, chain)
        assert out.view(2, 7, VOCAB)[:, node].equal(alone.view(2, -1, VOCAB)[:, -1])
    assert out[:, 2].isinf().sum() == 3  # the stop token, of the first request's anchor, 1 and 2


class _NoWaits(TorchDispatchMode):
    """Fails on operators that make the host wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique")
        assert not any(part in name for part in waits), name
        if "repeat_interleave" in name:
            assert (kwargs or {}).get("output_size") is not None, name
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(penalties):
    retracted = Request(0, output_ids=[5, 6], min_new_tokens=3)
    with _NoWaits():
        chosen = penalties.select(batch(retracted, Request(1), prefill=True))
        penalties.commit_prefill(chosen, torch.tensor([1, 2]))
        chosen = penalties.select(batch(retracted))
        penalties.apply(chosen, torch.zeros(4, VOCAB), torch.tensor([[1, 2, 3, 4]]))
        penalties.commit(chosen, torch.tensor([[3, 4, 5, 6]]), torch.tensor([2]))
