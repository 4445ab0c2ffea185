"""Requests with a seed or min_p: what they ask for is what the sampler does."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from engines import ALL_ARMS, running_engine
from scipy.stats import chisquare
from sglang.srt.plugins import load_plugins

from dflare.cpu.seeds import murmur_hash32
from dflare.engine import sampling
from dflare.engine.sampling import sample_tokens, sample_verify_positions, seeds_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def plugins():
    """The hash of seeded draws is a hook of the CPU platform."""
    load_plugins()


def info(n: int, **changes) -> SimpleNamespace:
    """A `SamplingBatchInfo` of n requests that filter nothing."""
    facts = {
        "temperatures": torch.ones(n, 1),
        "top_ks": torch.full((n,), 1 << 30, dtype=torch.int32),
        "top_ps": torch.ones(n),
        "min_ps": torch.zeros(n),
        "sampling_seed": None,
        "is_all_greedy": False,
    }
    facts |= changes
    facts["need_min_p_sampling"] = bool((facts["min_ps"] > 0).any())
    facts["need_top_p_sampling"] = bool((facts["top_ps"] < 1).any())
    facts["need_top_k_sampling"] = bool((facts["top_ks"] < 1 << 30).any())
    return SimpleNamespace(**facts)


def test_the_hash_is_that_of_sglangs_kernel():
    """Interpreted, in a process of its own: Triton decides at import."""
    script = """
import torch
from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32_kernel
seeds = torch.tensor([0, 7, -1, 2**62 + 12345])
positions = torch.tensor([0, 5, 2**31 - 1, 77])
columns = torch.arange(300)
out = torch.empty(4, 300, dtype=torch.uint32)
murmur_hash32_kernel[4, 1](seeds.to(torch.uint64), positions, columns, out, 4, 300, BLOCK_SIZE=512)
print(out.to(torch.int64).tolist())
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = torch.tensor(eval(run.stdout.splitlines()[-1]))
    ours = murmur_hash32(
        torch.tensor([0, 7, -1, 2**62 + 12345]),
        torch.tensor([0, 5, 2**31 - 1, 77]),
        torch.arange(300),
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("seeded", [False, True])
def test_min_p_excludes_and_keeps_proportions(seeded):
    """Probabilities 0.5, 0.3, 0.15, 0.05 with min_p 0.2 leave the first three."""
    n = 4000
    probs = torch.tensor([0.05, 0.5, 0.15, 0.3]).repeat(n, 1)
    seeds = torch.arange(n) if seeded else None
    torch.manual_seed(0)
    tokens = sample_tokens(
        probs, info(n, min_ps=torch.full((n,), 0.2), sampling_seed=seeds), torch.arange(n)
    )
    counts = torch.bincount(tokens, minlength=4)
    assert counts[0] == 0
    expected = torch.tensor([0.5, 0.15, 0.3], dtype=torch.float64) / 0.95 * n
    assert chisquare(counts[1:].tolist(), expected.tolist()).pvalue > 1e-4


def test_a_seed_decides_by_position_and_not_by_width():
    """The same text comes from steps of width 1 as from blocks."""
    torch.manual_seed(1)
    logits = torch.randn(12, 500)
    seed = torch.tensor([3])
    positions = torch.arange(20, 32)
    block = sample_verify_positions(logits, info(1, sampling_seed=seed), positions, 12)
    alone = [
        sample_verify_positions(
            logits[i : i + 1], info(1, sampling_seed=seed), positions[i : i + 1], 1
        )
        for i in range(12)
    ]
    assert torch.equal(block, torch.cat(alone))
    other = sample_verify_positions(logits, info(1, sampling_seed=seed + 1), positions, 12)
    assert not torch.equal(block, other)


@pytest.mark.parametrize("requests_at_once", [1, 2, 3])
def test_requests_that_verify_different_numbers_of_tokens_draw_as_alone(
    monkeypatch, requests_at_once
):
    torch.manual_seed(3)
    widths = torch.tensor([4, 1, 3])
    monkeypatch.setattr(sampling, "_PART_BYTES", requests_at_once * 4 * 4 * 500)
    logits, positions = torch.randn(8, 500), torch.arange(40, 48)
    seeds, temperatures = torch.tensor([3, 5, 7]), torch.tensor([[0.5], [1.0], [2.0]])

    def draw(rows, requests, width):
        own = info(3, sampling_seed=seeds[requests], temperatures=temperatures[requests])
        own = dataclasses.make_dataclass("Info", vars(own))(**vars(own))
        return sample_verify_positions(logits[rows], own, positions[rows], width)

    together = draw(slice(0, 8), slice(0, 3), widths)
    ends = widths.cumsum(0).tolist()
    alone = [
        draw(slice(end - width, end), slice(i, i + 1), width)
        for i, (end, width) in enumerate(zip(ends, widths.tolist(), strict=True))
    ]
    assert torch.equal(together, torch.cat(alone))


def test_a_seeded_draw_does_not_depend_on_what_others_ask_for():
    torch.manual_seed(2)
    probs = torch.softmax(torch.randn(1, 300), -1)
    for seed in range(20):
        seeds, position = torch.tensor([seed]), torch.tensor([9])
        alone = sample_tokens(probs, info(1, sampling_seed=seeds), position)
        beside = info(
            2,
            sampling_seed=torch.tensor([seed, 1]),
            top_ks=torch.tensor([1 << 30, 5]),
            top_ps=torch.tensor([1.0, 0.5]),
            min_ps=torch.tensor([0.0, 0.1]),
        )
        together = sample_tokens(probs.repeat(2, 1), beside, position.repeat(2))
        assert together[0] == alone


def test_requests_without_a_seed_stay_random_beside_seeded_ones():
    def request(seed):
        return SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed))

    batch = SimpleNamespace(sampling_info=info(3), reqs=[request(5), request(None), request(-1)])
    first, second = seeds_of(batch), seeds_of(batch)
    assert first[0] == second[0] == 5 and first[2] == second[2] >= 0
    assert first[1] != second[1]
    batch.reqs = [request(None)] * 3
    assert seeds_of(batch) is None


@pytest.fixture(scope="module")
def answers(random_pair):
    """The same seeded requests twice on one engine, in other company and at other widths."""
    prompts = [[5 + i, 6, 7] for i in range(5)]
    hot = {"temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True, "sampling_seed": 11}
    kinds = [hot, hot | {"top_k": 20, "top_p": 0.9}, hot | {"min_p": 0.02}]
    with running_engine(*random_pair, ALL_ARMS) as engine:

        def run(kind, ids):
            return engine.generate(input_ids=ids, sampling_params=kind)

        alone = [[run(kind, ids)["output_ids"] for ids in prompts] for kind in kinds]
        free = hot | {"sampling_seed": None}
        batched = engine.generate(
            input_ids=[ids for _ in kinds for ids in prompts] + prompts,
            sampling_params=[kind for kind in kinds for _ in prompts] + [free] * 5,
        )
        unseeded = [run(free, prompts[0])["output_ids"] for _ in range(2)]
    together = [answer["output_ids"] for answer in batched]
    return alone, [together[5 * i : 5 * i + 5] for i in range(len(kinds))], unseeded


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(answers):
    alone, together, _ = answers
    assert together == alone


def test_without_a_seed_texts_differ(answers):
    first, second = answers[2]
    assert first != second
