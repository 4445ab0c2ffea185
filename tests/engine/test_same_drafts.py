"""The engine drafts exactly what the paper's equations give, whatever its caches went through.

This is the test that catches a drafter fed wrong context: such a drafter only accepts less.
"""

import itertools
import random
from typing import Any

import pytest
from checkpoints import write_random_draft, write_random_target
from engines import MOSTLY_PLAIN, TURNS, proposals, running_engine
from prompts import chat
from reference_drafter import ReferencePair
from same_drafts import assert_same_drafts

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0, "ignore_eos": True}


def random_prompts(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [draw.randrange(5, 500) for _ in range(draw.randrange(low, high))] for _ in range(count)
    ]


def generate(engine, prompts, new_tokens: int, name: str, **sampling) -> list[dict[str, Any]]:
    """Generate all prompts at once."""
    return engine.generate(
        input_ids=prompts,
        sampling_params=GREEDY | {"max_new_tokens": new_tokens} | sampling,
        rid=[f"{name}-{i}" for i in range(len(prompts))],
    )


def check(engine, pair: ReferencePair, prompts, new_tokens: int, name: str, window=None) -> int:
    """Generate all prompts at once and check every step of each; returns accepted draft tokens."""
    answers = generate(engine, prompts, new_tokens, name)
    return check_answers(pair, prompts, answers, name, window)


def check_answers(
    pair: ReferencePair, prompts, answers, name: str, window=None, **more: bool
) -> int:
    return sum(
        assert_same_drafts(
            pair, prompt, answer["output_ids"], proposals(f"{name}-{i}"), window, **more
        )
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    )


WIDTHS = {"all-widths": TURNS, "mostly-plain": MOSTLY_PLAIN}


def combinations(short: set[tuple], *options) -> list:
    """All combinations of the options as parameters; those that are not `short` take `long`."""
    return [
        pytest.param(*values, marks=[] if values in short else pytest.mark.long)
        for values in itertools.product(*options)
    ]


@pytest.mark.parametrize(
    ("page_size", "radix", "widths"),
    # Each page size, with and without a radix cache, at both kinds of widths; one in chunks.
    combinations(
        {
            (1, True, "all-widths"),
            (16, True, "mostly-plain"),
            (64, False, "all-widths"),
        },
        (1, 16, 64),
        (True, False),
        WIDTHS,
    ),
)
def test_pages_and_radix_hits(random_pair, random_reference, page_size, radix, widths):
    prompts = random_prompts(6, 1, 150)
    shared = [prompts[0][:70] + tail for tail in random_prompts(3, 1, 60, seed=1)]
    name = f"pages-{page_size}-{radix}-{widths}"
    flags = {"page_size": page_size, "disable_radix_cache": not radix}
    if page_size == 16:
        flags["chunked_prefill_size"] = 64
    with running_engine(*random_pair, WIDTHS[widths], **flags) as engine:
        check(engine, random_reference, prompts, 70, name)
        # The same prompts again, and others that begin alike: from the cache if there is one.
        check(engine, random_reference, prompts[:3], 20, name + "-again")
        check(engine, random_reference, shared, 20, name + "-shared")
    for i in range(len(prompts)):
        met = {len(step["block"]) for step in proposals(f"{name}-{i}")}
        assert met == {min(width, random_reference.block_size) for width in WIDTHS[widths]}


@pytest.mark.parametrize("page_size", [pytest.param(1, marks=pytest.mark.long), 16])
def test_radix_hits_in_answers(random_pair, random_reference, page_size):
    """An answer ends, or is cut short by its client, while context of its tokens still waits."""
    prompts, tails = random_prompts(4, 5, 60), random_prompts(4, 5, 30, seed=1)
    name = f"answers-{page_size}"

    async def abort(engine, prompt):
        stream = await engine.async_generate(
            input_ids=prompt,
            sampling_params=GREEDY | {"max_new_tokens": 2000},
            rid=f"{name}-doomed",
            stream=True,
        )
        async for chunk in stream:
            if chunk["meta_info"]["completion_tokens"] >= 30:
                engine.tokenizer_manager.abort_request(f"{name}-doomed")
        assert chunk["meta_info"]["finish_reason"]["type"] == "abort"
        return chunk["output_ids"]

    with running_engine(*random_pair, MOSTLY_PLAIN, page_size=page_size) as engine:
        # Fifty tokens end some plain steps behind a draft.
        outputs = [answer["output_ids"] for answer in generate(engine, prompts[:3], 50, name)]
        outputs.append(engine.loop.run_until_complete(abort(engine, prompts[3])))
        turns = [[*p, *o, *t] for p, o, t in zip(prompts, outputs, tails, strict=True)]
        answers = generate(engine, turns, 60, name + "-next")
        check_answers(random_reference, turns, answers, name + "-next")
        for prompt, output, answer in zip(prompts, outputs, answers, strict=True):
            cached = answer["meta_info"]["cached_tokens"]
            assert cached > len(prompt) + len(output) - 2 * page_size, "no hit in the answer"


@pytest.mark.long  # pages of 16 come in chunks above
@pytest.mark.parametrize("page_size", [1, 16])
def test_chunked_prefill(random_pair, random_reference, page_size):
    with running_engine(*random_pair, page_size=page_size, chunked_prefill_size=64) as engine:
        check(engine, random_reference, random_prompts(5, 100, 300), 30, f"chunked-{page_size}")


@pytest.mark.parametrize(
    ("page_size", "widths"),
    combinations({(1, "all-widths"), (16, "mostly-plain")}, (1, 16), WIDTHS),
)
def test_retraction(random_pair, random_reference, page_size, widths):
    name = f"retract-{page_size}-{widths}"
    # Eight requests of about 200 tokens at the end do not fit into 640 slots, though each begins.
    with running_engine(
        *random_pair,
        WIDTHS[widths],
        page_size=page_size,
        max_total_tokens=640,
        schedule_conservativeness=0.01,
    ) as engine:
        prompts = random_prompts(8, 40, 60)
        # With ignore_eos SGLang knows how long an answer gets, and admits what fits.
        answers = generate(engine, prompts, 150, name, ignore_eos=False)
        # A token that comes with the prefill after a retraction was never drafted.
        check_answers(random_reference, prompts, answers, name, mixed=True)
    retracted = sum(answer["meta_info"]["num_retractions"] for answer in answers)
    assert retracted, "the pool was large enough after all"


def test_draft_window(random_pair, random_reference):
    turns = (1, 1, 1, 4)  # behind plain steps too
    with running_engine(*random_pair, turns, speculative_draft_window_size=32) as engine:
        check(engine, random_reference, random_prompts(4, 10, 120), 40, "window", window=32)


def test_sliding_layers_attention_bias_and_wide_heads(tmp_path):
    """GPT-OSS-like shapes: biased projections, heads that do not add up to the hidden size."""
    target = write_random_target(tmp_path / "target", architecture="qwen3", head_dim=32)
    draft = write_random_draft(
        tmp_path / "draft",
        num_layers=3,
        layer_types=("full_attention", "sliding_attention", "sliding_attention"),
        sliding_window=24,
        attention_bias=True,
        head_dim=64,
        num_heads=8,
        num_kv_heads=1,
    )
    with running_engine(target, draft, page_size=16) as engine:
        check(engine, ReferencePair(target, draft), random_prompts(4, 10, 120), 40, "shapes")


def test_demo_pair_accepts(demo_pair, demo_reference, demo_tokenizer):
    """A trained drafter: verified blocks of several tokens, a radix hit, chunks, small pages."""
    questions = (
        "Count from 1 to 30, separated by commas.",
        "Say the word 'repeat' twenty times.",
    )
    prompts = [chat(demo_tokenizer, question) for question in questions]
    with running_engine(*demo_pair, page_size=16, chunked_prefill_size=64) as engine:
        accepted = check(engine, demo_reference, prompts, 40, "demo")
        accepted += check(engine, demo_reference, prompts, 16, "demo-again")
    assert accepted > 20, f"only {accepted} draft tokens were accepted"
