"""Trees in the engine accept what the marginals promise, and answers stay the target's."""

from types import SimpleNamespace

import pytest
import torch
from demo_answers import generate, tokens
from engines import running_engine
from prompts import chat_prompts
from test_sampling import (
    LENGTH,
    SAMPLES,
    SAMPLING,
    assert_distribution,
    constant_pair,  # noqa: F401 - a fixture
    find_repeating_prompt,
    three_tokens,
)

from dflare.training.data.target import load_target
from dflare.training.drafter.export import load_drafter
from dflare.training.run.draft_table import draft_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def questions(demo_tokenizer):
    return chat_prompts(demo_tokenizer, 6)


@pytest.fixture(scope="module")
def expected(alone, questions):
    """What the target alone says to them, in 64 tokens."""
    return tokens(alone["chats"])[: len(questions)]


def test_a_served_tree_accepts_what_the_table_of_drafts_says(demo_pair, questions):
    """Step by step as many tokens as a walk over drafts made with PyTorch at every position."""
    sampling = {"max_new_tokens": 48, "ignore_eos": True}
    with running_engine(*demo_pair, (("tree", 12),)) as engine:
        answers = generate(engine, questions, concurrency=3, **sampling)
    drafter = load_drafter(str(demo_pair[1]))
    target = load_target(str(demo_pair[0]), drafter.config.target_layer_ids)
    more = 0
    for prompt, answer in zip(questions, answers, strict=True):
        table = draft_table(target, drafter, prompt, answer["output_ids"])
        walked = table.tree([12])[12]
        meta = answer["meta_info"]
        assert meta["spec_verify_ct"] == len(walked)
        histogram = meta["spec_correct_drafts_histogram"]
        # The last step may accept more than the answer has room for.
        counted = [walked[:-1].count(accepted + 1) for accepted in range(len(histogram))]
        assert sum(histogram) - sum(counted) == 1
        assert all(0 <= n - m <= 1 for n, m in zip(histogram, counted, strict=True))
        more += len(table.chain(drafter.config.block_size)) - len(walked)
    assert more > 0, "trees saved no step, so nothing was shown"


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"page_size": 16, "chunked_prefill_size": 64, "enable_mixed_chunk": True},
    ],
    ids=str,
)
def test_greedy_answers_with_trees_alone(demo_pair, questions, expected, flags):
    turns = (("tree", 12), ("tree", 7), ("tree", 2), ("lookup", 2))
    with running_engine(*demo_pair, turns, **flags) as engine:
        for concurrency in (1, 6):
            answers = generate(engine, questions, concurrency=concurrency, max_new_tokens=64)
            assert tokens(answers) == expected


def test_distribution_of_three_tokens_with_trees(constant_pair):  # noqa: F811
    target, draft, model, _ = constant_pair
    prompt = find_repeating_prompt(model)
    sampling = SAMPLING | {"max_new_tokens": LENGTH}
    turns = (("tree", 8), ("tree", 3), ("lookup", 2), ("tree", 5))
    with running_engine(target, draft, widths=turns, random_seed=7) as engine:
        answers = engine.generate(input_ids=[prompt] * SAMPLES, sampling_params=sampling)
    assert_distribution(answers, three_tokens(model, prompt))
    accepted = sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
    assert SAMPLES * 0.05 < accepted < SAMPLES * 1.9, "both accepting and rejecting must happen"


def test_targets_that_cannot_are_served_chains():
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from dflare.engine.tree_step import why_no_trees

    class TritonAttnBackend(SimpleNamespace):
        """By this name SGLang's own rules for masks go, too."""

    def reason(recurrent=False, **changes):
        head = SimpleNamespace(weight=torch.ones(4, 2), shard_indices=None)
        runner = {
            "token_to_kv_pool": object.__new__(MHATokenToKVPool),
            "attn_backend": TritonAttnBackend(sliding_window_size=None),
            "model": SimpleNamespace(lm_head=head),
        }
        runner = SimpleNamespace(**runner | changes)
        return why_no_trees(
            SimpleNamespace(_need_mamba_verify_commit=recurrent, model_runner=runner)
        )

    assert "recurrent states" in reason(recurrent=True)
    assert "slots of a NoneType" in reason(token_to_kv_pool=None)
    assert "SimpleNamespace would take a tree" in reason(attn_backend=SimpleNamespace())
    window = TritonAttnBackend(sliding_window_size=128)
    assert "sliding window" in reason(attn_backend=window)
    assert "gives no logits" in reason(model=SimpleNamespace())
    assert "gives no logits" in reason()  # nobody knows which rows are tokens


def test_a_grammar_walks_each_nodes_children_in_their_order():
    from dflare.engine.tree_step import DraftTree

    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 0], [-1, 0, 1, 2, 3, 4, 5]]).int()
    tree = DraftTree(torch.arange(14).view(2, 7), parents, torch.zeros_like(parents))
    child, sibling, tokens = tree.for_grammar().resolve()
    assert tokens.equal(tree.tokens)
    for row in range(2):
        for node in range(7):
            met, at = [], int(child[row, node])
            while at >= 0:
                met.append(at)
                at = int(sibling[row, at])
            assert met == [i for i in range(7) if parents[row, i] == node]
