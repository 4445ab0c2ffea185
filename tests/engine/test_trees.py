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

from dflare.adaptive import AdaptiveConfig, Arm
from dflare.training.data.target import load_target
from dflare.training.drafter.export import load_drafter
from dflare.training.run.draft_table import draft_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def questions(demo_tokenizer):
    return chat_prompts(demo_tokenizer, 4)


@pytest.fixture(scope="module")
def expected(alone, questions):
    """What the target alone says to them, in 64 tokens."""
    return tokens(alone["chats"])[: len(questions)]


def test_a_served_tree_accepts_what_the_table_of_drafts_says(demo_pair, questions, expected):
    """The target's tokens, and step by step as many as a walk over drafts made with PyTorch."""
    sampling = {"max_new_tokens": 48, "ignore_eos": True}
    with running_engine(*demo_pair, (("tree", 12),)) as engine:
        answers = generate(engine, questions, concurrency=3, **sampling)
    drafter = load_drafter(str(demo_pair[1]))
    target = load_target(str(demo_pair[0]), drafter.config.target_layer_ids)
    more = 0
    for prompt, answer, alone in zip(questions, answers, expected, strict=True):
        ids = answer["output_ids"]
        assert ids[: len(alone)] == alone[: len(ids)]
        table = draft_table(target, drafter, prompt, ids)
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


@pytest.mark.long  # test_lossless.py has the same flags, with trees behind trees in its turns
@pytest.mark.parametrize(
    "flags",
    [{}, {"page_size": 16, "chunked_prefill_size": 64, "enable_mixed_chunk": True}],
    ids=str,
)
def test_greedy_answers_with_trees_alone(demo_pair, questions, expected, flags):
    turns = (("tree", 12), ("tree", 7), ("tree", 2), ("lookup", 2))
    with running_engine(*demo_pair, turns, **flags) as engine:
        for concurrency in (1, 4):
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


def test_requests_that_verify_less_leave_nothing_of_the_others_behind():
    """Whatever stands in the rows that they do not have is on no way, and costs the target none."""
    from dflare.engine.tree_proposal import DraftTree
    from dflare.ops import tree_ancestors, walk_draft_tree

    parents = torch.tensor([[-1, 0, 0, 1, 1], [-1, 0, 1, 2, 3], [-1, 0, 1, 0, 2]]).int()
    tokens = torch.arange(15).view(3, 5)
    whole = DraftTree(tokens, parents, torch.tensor([[0, 1, 1, 2, 2]] * 3).int())
    tree = whole.cut(torch.tensor([3, 4, 1]))
    assert (tree.width, tree.verified, tree.starts().tolist()) == (4, 8, [0, 3, 7])
    assert tree.packed(tree.tokens).tolist() == [0, 1, 2, 5, 6, 7, 8, 10]
    assert tree.packed(tree.parents).tolist() == [-1, 0, 0, -1, 0, 1, 2, -1]
    spread = tree.spread(torch.arange(1, 9)).view(3, 4)
    assert spread.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7], [8, 0, 0, 0]]
    # The target says what the rows that are cut off would have said.
    said = torch.tensor([[1, 3, 9, 9], [6, 7, 8, 9], [11, 12, 13, 14]])
    _, lens, _ = walk_draft_tree(tree.tokens, tree.parents, said, 5)
    assert lens.tolist() == [2, 4, 1]
    real = tree.tokens >= 0
    assert not (tree_ancestors(tree.parents) & real[:, :, None] & ~real[:, None]).any()
    child, _, _ = tree.for_grammar().resolve()
    assert child.tolist() == [[1, -1, -1, 3], [1, 2, 3, -1], [-1, 1, 2, 3]]
    assert whole.cut(torch.tensor([5, 5, 5])).rows is None


def test_slots_of_anchors_alone_are_no_longer_strided():
    """Operators write to slots that lie side by side; these are a column of the step's slots."""
    from dflare.engine.tree_proposal import DraftTree

    column = torch.zeros(3, 1, dtype=torch.int32)
    tree = DraftTree(torch.arange(3)[:, None], column - 1, column)
    slots = tree.packed(torch.arange(12).view(3, 4)[:, : tree.width])
    assert slots.is_contiguous()
    assert slots.tolist() == [0, 4, 8]


def test_look_ups_alone_verify_nothing_where_nothing_was_found():
    from dflare.engine.lookups import Proposal
    from dflare.engine.tree_proposal import TreeProposals

    found = torch.tensor([[5, 6, 7], [0, 0, 0]])
    look_up = Proposal(found, torch.tensor([4, 0]).int(), torch.tensor([1, 2]), found)
    draft_input = SimpleNamespace(bonus_tokens=torch.tensor([1, 2]))
    proposals = TreeProposals(SimpleNamespace(device="cpu"), ragged=True, longest=3)

    def make(nodes, most=8):
        batch = SimpleNamespace(reqs=[], spec_info=draft_input)
        tree = proposals.make(batch, Arm("lookup", nodes), look_up, most)
        return tree.packed(tree.tokens).tolist()

    assert make(3) == [1, 5, 6, 2, 0, 0], "start-up measures what it asks for"
    proposals.weigh(look_up, 0)
    assert make(3) == [1, 5, 6, 2]
    assert make(4, most=2) == [1, 5, 2]
    assert not look_up.pays_nothing()


def test_of_look_ups_alone_what_is_worth_its_time_is_verified():
    from dflare.engine.lookups import Proposal
    from dflare.engine.tree_proposal import TreeProposals

    found = torch.arange(20).view(2, 10)
    look_up = Proposal(found, torch.tensor([20, 3]).int(), torch.tensor([1, 2]), found)
    proposals = TreeProposals(SimpleNamespace(device="cpu"), ragged=True, longest=10)
    for step in range(1280):  # a long match goes on; behind a short one a token in four is right
        right = torch.tensor([10, int(step % 4 == 0)])
        proposals.learn(look_up, right, torch.tensor([11, 2]))
    worth = {}
    for odds in (50, 200, 400):
        proposals.weigh(look_up, odds)
        worth[odds] = look_up.worth.tolist()
    assert worth == {50: [10, 1], 200: [10, 1], 400: [10, 0]}
    assert not look_up.pays_nothing()
    short = Proposal(found, torch.tensor([3, 0]).int(), torch.tensor([1, 2]), found)
    proposals.weigh(short, 400)
    assert short.pays_nothing()


def test_no_request_verifies_beyond_its_row_of_slots():
    from dflare.engine.tree_step import TreeStep

    pool = SimpleNamespace(req_to_token=torch.zeros(2, 40, dtype=torch.int32))
    runner = SimpleNamespace(req_to_token_pool=pool)
    worker = SimpleNamespace(device="cpu", model_runner=runner)
    trees = TreeStep(worker, AdaptiveConfig.for_block_size(6).sharing(6, 12))
    for longest, most in ((20, 12), (28, 12), (31, 9)):
        batch = SimpleNamespace(seq_lens=torch.tensor([5, longest]))
        assert trees.most(Arm("tree", 3), batch) == most


def test_a_grammar_walks_each_nodes_children_in_their_order():
    from dflare.engine.tree_proposal import DraftTree

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
