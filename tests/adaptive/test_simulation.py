from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from bench.policy import scenarios, simulate

from dflare.adaptive import AdaptiveConfig

# What the demo pair's server measured when it started (its about says where), and two models.
MEASURED = Path(__file__).parents[2] / "bench/results/cpu-amd-epyc/step-times.json"
DEMO = scenarios.measured(MEASURED, AdaptiveConfig.for_block_size(6).widths)
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


def by_speed(scenario, runs):
    fast = any(name in scenario.name for name in FAST)
    marks = [] if fast else [pytest.mark.slow]
    return pytest.param(scenario, runs, marks=marks, id=scenario.name)


@pytest.mark.parametrize(("scenario", "runs"), [by_speed(*workload) for workload in WORKLOADS])
def test_regret_against_the_oracle_is_at_most_five_percent(scenario, runs):
    config = AdaptiveConfig.for_block_size(scenario.block_size, proposers=["chain"])
    outcomes = [simulate.run(scenario, seed=seed, config=config) for seed in range(runs)]
    assert mean(outcome.regret for outcome in outcomes) <= 0.05
    assert mean(outcome.explored for outcome in outcomes) <= 0.02
