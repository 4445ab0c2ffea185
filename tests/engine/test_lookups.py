"""Look-ups in the engine propose what the text says, and answers stay the target's."""

from types import SimpleNamespace

import pytest
import torch
from demo_answers import tokens
from engines import proposals, running_engine
from test_same_drafts import random_prompts

from dflare.adaptive import NEVER
from dflare.engine.lookups import Proposal, Texts
from dflare.ops import lookup_continuations_reference

pytestmark = pytest.mark.slow

# Trees are verified in other slots than those that their path ends in.
LOOK_UPS = (("lookup", 4), 1, ("tree", 6), ("lookup", 3), ("tree", 8), ("lookup", 2))
GREEDY = {"temperature": 0, "ignore_eos": True}


def expected_block(text: list[int], width: int) -> list[int]:
    """What a look-up alone proposes behind a text whose last token is the anchor."""
    found, _ = lookup_continuations_reference(
        torch.tensor(text[:-1]).int(),
        torch.arange(len(text) - 1)[None],
        torch.tensor([0]),
        torch.tensor([len(text) - 1]),
        torch.tensor(text[-1:]),
        width,
    )
    return [text[-1], *found[0].tolist()][:width]


def check_proposals(prompts, answers, steps_of) -> int:
    """Every step proposed what the request's own text says; returns how many found something."""
    found = 0
    for prompt, answer, steps in zip(prompts, answers, steps_of, strict=True):
        assert steps, "no step at all"
        text = prompt + answer["output_ids"]
        for step in steps:
            so_far = text[: step["prefix"] + 1]
            assert step["block"] == expected_block(so_far, len(step["block"]))
            found += any(step["block"][1:])
    return found


def check_named(prompts, answers, name: str) -> int:
    return check_proposals(
        prompts, answers, [proposals(f"{name}-{i}") for i in range(len(prompts))]
    )


def repeating_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts that end as they begin, so that look-ups find something from the first step on."""
    return [ids + ids[: len(ids) // 2] for ids in random_prompts(count, 20, 120, seed=seed)]


def ask(engine, prompts, new_tokens: int, name: str, **sampling):
    return engine.generate(
        input_ids=prompts,
        sampling_params=GREEDY | {"max_new_tokens": new_tokens} | sampling,
        rid=[f"{name}-{i}" for i in range(len(prompts))],
    )


@pytest.mark.parametrize(
    "flags",
    [
        {"page_size": 1},
        pytest.param({"page_size": 16, "disable_radix_cache": True}, marks=pytest.mark.long),
        {"page_size": 16, "chunked_prefill_size": 64},
    ],
    ids=str,
)
def test_proposals_are_what_the_text_says(random_pair, flags):
    """Behind prefills in chunks, radix hits in prompts and answers, and rejected proposals."""
    prompts = repeating_prompts(5)
    name = "-".join(map(str, flags.values()))
    with running_engine(*random_pair, LOOK_UPS, **flags) as engine:
        answers = ask(engine, prompts, 60, name)
        found = check_named(prompts, answers, name)
        turns = [p + a["output_ids"] + [7, 8, 9] for p, a in zip(prompts, answers, strict=True)]
        again = ask(engine, turns, 40, f"{name}-again")
        found += check_named(turns, again, f"{name}-again")
    assert found > 20
    if "disable_radix_cache" not in flags:
        assert all(answer["meta_info"]["cached_tokens"] > 50 for answer in again)


def test_proposals_after_retraction(random_pair):
    flags = {"max_total_tokens": 640, "schedule_conservativeness": 0.01}
    with running_engine(*random_pair, LOOK_UPS, **flags) as engine:
        prompts = [ids[:50] for ids in repeating_prompts(8)]
        answers = ask(engine, prompts, 150, "retracted-texts", ignore_eos=False)
    assert any(answer["meta_info"]["num_retractions"] for answer in answers)
    assert check_named(prompts, answers, "retracted-texts") > 20


@pytest.mark.parametrize("prefixes", [False, True])
def test_a_prefix_that_came_from_elsewhere_is_noted_too(prefixes):
    """HiCache fills slots without a prefill; slots that nobody else fills are noted already."""
    table = torch.arange(32, dtype=torch.int32).view(2, 16)
    runner = SimpleNamespace(
        device="cpu",
        token_to_kv_pool=SimpleNamespace(size=31, page_size=1),
        req_to_token_pool=SimpleNamespace(req_to_token=table),
    )
    texts = Texts(runner, prefixes=prefixes)
    req = SimpleNamespace(origin_input_ids=[1, 2, 3, 4, 5], output_ids=[1, 2], req_pool_idx=1)
    batch = SimpleNamespace(
        reqs=[req],
        prefix_lens=[5],
        out_cache_loc=torch.tensor([21, 22]),
        input_ids=torch.tensor([1, 2]),
        req_pool_indices=torch.tensor([1]),
        seq_lens=torch.tensor([7]),
        spec_info=SimpleNamespace(bonus_tokens=torch.tensor([3])),
    )
    texts.write_prefixes(batch)
    texts.write_prefill(batch)
    proposal = texts.look_up(batch, table[1:, 7:9].long())
    assert (proposal.found[0].tolist(), int(proposal.match)) == (
        ([4, 5], 3) if prefixes else ([0, 0], 0)
    )


def test_a_text_goes_on_with_what_was_committed():
    """Wherever the step verified it: a rejected token leaves nothing behind."""
    table = torch.arange(32, dtype=torch.int32).flip(0).view(2, 16)
    runner = SimpleNamespace(
        device="cpu",
        token_to_kv_pool=SimpleNamespace(size=31, page_size=1),
        req_to_token_pool=SimpleNamespace(req_to_token=table),
    )
    texts, text = Texts(runner, prefixes=False), [4]

    def look_up():
        length = len(text) - 1
        batch = SimpleNamespace(
            req_pool_indices=torch.tensor([1]),
            seq_lens=torch.tensor([length]),
            spec_info=SimpleNamespace(bonus_tokens=torch.tensor(text[-1:])),
        )
        return texts.look_up(batch, table[1:, length : length + 3].long())

    for committed, rejected in (([5, 6, 7], []), ([4, 5], [9]), ([6, 7, 4], []), ([5], [9, 9])):
        texts.write_committed(look_up(), torch.tensor([committed + rejected]))
        text += committed
    proposal = look_up()
    assert (proposal.found[0].tolist(), int(proposal.match)) == ([6, 7, 4], 6)


def proposal_of(found: list[list[int]], match: list[int]) -> Proposal:
    """What was found, wherever."""
    nothing = torch.zeros(len(match), dtype=torch.int64)
    lengths = torch.tensor(match, dtype=torch.int32)
    return Proposal(torch.tensor(found), lengths, anchors=nothing, slots=nothing[:, None])


def compare(proposal: Proposal, committed: torch.Tensor, lens: list[int]):
    return proposal.compare(proposal.right(committed, torch.tensor(lens)))()


def test_a_proposal_replaces_drafts_and_is_held_against_what_was_committed():
    proposal = proposal_of([[5, 6, 7], [5, 6, 7], [0, 0, 0]], [9, 3, 0])
    drafts = torch.tensor([[5, 9], [1, 2], [0, 4]])
    proposal.splice(drafts, least_strength=4)
    assert drafts.tolist() == [[5, 6], [1, 2], [0, 4]]
    committed = torch.tensor([[5, 6, 8], [1, 3, 0], [0, 4, 2]])
    seen = compare(proposal, committed, [3, 2, 3])
    assert seen.match.tolist() == [9, 3, 0]
    assert seen.right.tolist() == [2, 0, 0]
    assert seen.agreed.tolist() == [1, 0, 1]
    assert seen.drafted.tolist() == [1, 1, 2]


def test_drafts_that_nothing_replaces_are_compared_too():
    proposal = proposal_of([[5, 6, 7]], [40])
    drafts = torch.tensor([[5, 9]])
    proposal.splice(drafts, NEVER)
    assert drafts.tolist() == [[5, 9]]
    seen = compare(proposal, torch.tensor([[5, 6, 0]]), [2])
    assert [int(x[0]) for x in seen[:4]] == [40, 2, 1, 1]


def test_without_drafts_there_is_nothing_to_agree_with():
    proposal = proposal_of([[5, 6], [0, 0]], [4, 0])
    seen = compare(proposal, torch.tensor([[5, 8], [0, 0]]), [2, 1])
    assert [x.tolist() for x in seen[:4]] == [[4, 0], [1, 0], [-1, -1], [0, 0]]


def test_the_policy_finds_out_where_the_text_repeats(whole_blocks, measured):
    """With nothing set, copying takes far fewer steps than with the drafter's whole block."""
    whole, chosen = whole_blocks["copies"], measured["copies"]
    steps = [sum(answer["meta_info"]["spec_verify_ct"] for answer in a) for a in (whole, chosen)]
    assert steps[1] < 0.6 * steps[0], steps
    assert tokens(whole) == tokens(chosen)
