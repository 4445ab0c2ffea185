from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from bench.policy import scenarios, simulate

from dflare.adaptive import AdaptiveConfig

# What the demo pair's server measured when it started (its about says where), and two models.
MEASURED = Path(__file__).parents[2] / "bench/results/cpu-amd-epyc/step-times.json"
DEMO = scenarios.measured(MEASURED, AdaptiveConfig.for_block_size(6, proposers=["chain"]).arms)
STEP_TIMES = [
    ("measured", DEMO, 6, 16, 4),
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
