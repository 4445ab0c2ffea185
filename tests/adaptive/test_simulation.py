from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from bench.policy import scenarios, simulate
from bench.policy.world import World

from dflare.adaptive import PLAIN, AdaptiveConfig

# What the demo pair's server measured when it started (its about says where), and two models.
MEASURED = Path(__file__).parents[2] / "bench/results/cpu-amd-epyc/step-times.json"
DEMO = scenarios.measured(MEASURED, AdaptiveConfig.for_block_size(6, proposers=["chain"]).arms)
STEP_TIMES = [
    ("measured", DEMO, 6, 16, 2),
    ("cpu shape", scenarios.cpu, 8, 16, 1),
    ("gpu shape", scenarios.gpu, 16, 64, 1),
]
WORKLOADS = [
    (replace(scenario, name=f"{name}, {scenario.name}"), runs)
    for name, seconds, block_size, max_batch, runs in STEP_TIMES
    for scenario in scenarios.build(seconds, block_size, max_batch, steps=3000)
]
FAST = ("mix, 1 ", "jumps", "everything", "none, 1 ", "hard, 1 ")


def by_speed(scenario, runs, fast=FAST):
    marks = [] if any(name in scenario.name for name in fast) else [pytest.mark.slow]
    return pytest.param(scenario, runs, marks=marks, id=scenario.name)


@pytest.mark.parametrize(("scenario", "runs"), [by_speed(*workload) for workload in WORKLOADS])
def test_regret_against_the_oracle_is_at_most_five_percent(scenario, runs):
    config = AdaptiveConfig.for_block_size(scenario.block_size, proposers=["chain"])
    outcomes = [simulate.run(scenario, seed=seed, config=config) for seed in range(runs)]
    assert mean(outcome.regret for outcome in outcomes) <= 0.05
    assert mean(outcome.explored for outcome in outcomes) <= 0.02


@pytest.mark.parametrize(("wrong", "factor"), [("plain 1", 1.25), ("chain 2", 0.8)])
def test_a_width_that_start_up_measured_a_fifth_wrong_costs_little(wrong, factor, monkeypatch):
    """Steps of several widths, side by side in time, tell what a table alone cannot."""
    built = scenarios.build(scenarios.cpu, 8, 16, steps=400)
    scenario = next(each for each in built if each.name == "hard, 16 at a time")
    config = AdaptiveConfig.for_block_size(8, proposers=["chain"])
    right = [simulate.run(scenario, seed, config).rate for seed in range(2)]
    true = scenarios.start_up_table
    monkeypatch.setattr(
        scenarios,
        "start_up_table",
        lambda seconds, *rest: true(
            lambda n, arm: seconds(n, arm) * (factor if str(arm) == wrong else 1.0), *rest
        ),
    )
    rates = [simulate.run(scenario, seed, config).rate for seed in range(2)]
    assert mean(rates) >= 0.98 * mean(right)


@pytest.mark.parametrize("batch", [8, 16])
def test_a_new_server_under_load_does_not_pay_for_arms_that_cannot_win(batch):
    """The first 200 steps of hard prompts, where plain decoding is best: with many arms, too."""
    base = next(s for s in scenarios.build(scenarios.cpu, 6, 16, 200) if s.name.startswith("hard"))
    plain = scenarios.cpu(batch, PLAIN)
    scenario = replace(base, concurrency=lambda _: batch, duration=200 * plain)
    config = AdaptiveConfig.for_block_size(6)
    rates = [simulate.run(scenario, seed, config).rate for seed in range(2)]
    assert mean(rates) * plain / batch >= 0.94


# What look-ups gain at least, as a factor of the tokens per second without them; their oracle
# knows where every passage ends, which nobody can.
GAINS = {"copies, 1 ": 1.6, "copies, ": 1.25, "quotes, 1 ": 1.02}
LOOKED_UP = [
    (replace(scenario, name=f"{name}, {scenario.name}"), runs)
    for name, seconds, block_size, max_batch, runs in STEP_TIMES[1:]
    for scenario in scenarios.build(seconds, block_size, max_batch, steps=1500)
    if scenario.name.startswith(
        ("easy, 1 ", "hard, 1 ", "none, 1 ", "middle, copies", "hard, quotes")
    )
]


@pytest.mark.parametrize(
    ("scenario", "runs"),
    [by_speed(*workload, fast=("cpu shape, middle, copies, 1 ",)) for workload in LOOKED_UP],
)
def test_look_ups_gain_where_text_repeats_and_lose_next_to_nothing_elsewhere(scenario, runs):
    rates = {}
    for proposers in (("chain",), ("chain", "lookup")):
        config = AdaptiveConfig.for_block_size(scenario.block_size, proposers=proposers)
        outcomes = [simulate.run(scenario, seed=seed, config=config) for seed in range(runs)]
        rates[proposers] = mean(outcome.rate for outcome in outcomes)
    without, with_look_ups = rates.values()
    least = next((gain for kind, gain in GAINS.items() if kind in scenario.name), 0.97)
    assert with_look_ups >= least * without


@pytest.mark.parametrize(("seconds", "gain"), [(scenarios.cpu, 1.1), (scenarios.gpu, 1.1)])
def test_trees_gain_for_one_request_and_the_oracle_knows_them(seconds, gain):
    (scenario,) = (
        s for s in scenarios.build(seconds, 8, 16, steps=1500) if s.name == "hard, 1 at a time"
    )
    rates = {}
    for proposers in (("chain",), ("chain", "tree")):
        config = AdaptiveConfig.for_block_size(8, proposers=proposers)
        outcome = simulate.run(scenario, seed=0, config=config)
        assert outcome.regret <= 0.05
        rates[proposers] = outcome.rate
    without, with_trees = rates.values()
    assert with_trees >= gain * without


def test_what_is_expected_of_a_tree_is_what_it_accepts():
    scenario = scenarios.build(scenarios.cpu, 6, 4, steps=100)[0]
    scenario = replace(scenario, concurrency=lambda _: 3, level=lambda _: -0.3)
    world, luck = World(scenario, 0), np.random.default_rng(0)
    world.admit(0.0)
    world.batch[0].remaining = 2
    tree = world.tree(0.0, 12)
    drawn = np.mean([1 + tree.accepted(luck) for _ in range(4000)], axis=0)
    np.testing.assert_allclose(drawn, tree.expected_tokens()[:, -1], rtol=0.03)
    # The first nodes of a large tree are the small one.
    np.testing.assert_allclose(
        world.tree(0.0, 5).expected_tokens(), tree.expected_tokens()[:, :5], rtol=1e-6
    )
