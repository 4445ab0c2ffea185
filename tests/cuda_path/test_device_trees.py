"""Trees on the CUDA device: the target's tokens, in graphs and beyond them, without a wait.

The target's attention is Triton's, which takes a mask. Trees are drafted from the request's own
text, behind a wrong token at each depth: so paths leave the front of their trees.
"""

import pytest
from models import (
    CAPTURED,
    GRAMMAR,
    GREEDY,
    assert_greedy,
    check_answers,
    check_waits_and_races,
    prompts,
    repeating,
    write_pair,
)
from reference_drafter import ReferencePair
from scheduler_process import running_scheduler
from test_device_features import CASES

pytestmark = pytest.mark.slow

BLOCK = 8
TREES = [["tree", 8], ["tree", 3], ["tree", 5], ["lookup", 2]]
ALL_ARMS = [["tree", 8], 3, 1, ["tree", 5], ["lookup", 4], ["tree", 8], ["spliced", 4], 8, 1]
FLAGS = {
    "attention_backend": "triton",
    "from_text": True,
    "chunked_prefill_size": 64,
    "enable_mixed_chunk": True,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("trees"), block_size=BLOCK)


@pytest.fixture(scope="module")
def reference(pair):
    return ReferencePair(*pair)


@pytest.fixture(scope="module")
def trees(pair):
    with running_scheduler(*pair, widths=TREES + ALL_ARMS, **FLAGS, **GRAMMAR) as scheduler:
        scheduler.call("take", turns=TREES)
        yield scheduler


def test_trees_give_the_targets_tokens_in_fewer_steps(trees, reference):
    alone = repeating("alone", 1, new_tokens=160)
    result = trees.generate(alone)
    check_answers(result, alone, reference)
    assert len(result["widths"]) < 150, "hardly a node was accepted"
    # The target's graph and the drafter's of each tree, the target's of a look-up.
    assert result["replays"] == sum(1 + (width > 2) for width in result["widths"])


def test_batches_within_and_above_the_captured_sizes(trees, reference):
    requests = repeating("many", CAPTURED + 3)
    check_answers(trees.generate(requests), requests, reference)
    trees.call("flush_cache")
    trees.call("set_order", seed=3)
    check_answers(trees.generate(requests), requests, reference)
    trees.call("set_order", seed=None)


@pytest.mark.long
def test_parameters_are_the_targets(pair, trees):
    """Penalties, grammars, bias, logprobs and stops, as the target alone has them."""
    ids = prompts(1, 10, 11, seed=5)[0] * 2
    requests = [
        {"rid": name, "ids": ids, "sampling": GREEDY | {"max_new_tokens": 30} | sampling}
        for name, sampling in CASES.items()
    ]
    requests.append(requests[0] | {"rid": "logprobs", "sampling": GREEDY, "logprobs": 3})
    alone = {"attention_backend": "triton", "disable_overlap_schedule": True, "page_size": 1}
    with running_scheduler(pair[0], **alone, **GRAMMAR) as scheduler:
        expected = scheduler.generate(requests)["answers"]
    answers = trees.generate(requests)["answers"]
    for name in CASES:
        assert answers[name]["ids"] == expected[name]["ids"], name
        assert answers[name]["finish"] == expected[name]["finish"], name
    one, other = expected["logprobs"], answers["logprobs"]
    # SGLang keeps those of tokens behind the last that is asked for, and sends none of them.
    assert other["logprob_ids"][: len(other["ids"])] == one["logprob_ids"] == one["ids"]
    # bfloat16: rows of another batch are rounded elsewhere.
    assert one["logprobs"] == pytest.approx(other["logprobs"][: len(one["ids"])], abs=0.1)


def test_samples_have_their_seeds_and_limits(trees, reference):
    ids = prompts(1, 10, 11, seed=5)[0] * 2
    sampling = GREEDY | {"max_new_tokens": 24, "temperature": 3.0}
    requests = [
        {"rid": f"seed-{i}", "ids": ids, "sampling": sampling | {"sampling_seed": 7}}
        for i in range(2)
    ]
    requests.append({"rid": "min-p", "ids": ids, "sampling": sampling | {"min_p": 1.0}})
    answers = trees.generate(requests)["answers"]
    assert answers["seed-0"]["ids"] == answers["seed-1"]["ids"]
    assert_greedy(reference, ids, answers["min-p"]["ids"])


def test_every_arm_gives_the_targets_tokens_and_adds_no_wait(trees, reference):
    trees.call("take", turns=ALL_ARMS)
    check_waits_and_races(trees, repeating("arms", 4), reference)


def test_what_cannot_mask_a_tree_is_served_chains(pair):
    with running_scheduler(*pair, widths='{"widths": [1, 2], "trees": [4]}') as scheduler:
        backend, trees = scheduler.call(
            "attributes",
            paths=["draft_worker.model_runner.attn_backend", "draft_worker.trees"],
        )
    assert "FlashAttentionBackend" in backend and trees == "None"
