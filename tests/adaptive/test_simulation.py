from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import scenarios
import simulate

from dflare.adaptive import AdaptiveConfig

# What the demo pair's server measured when it started (its about says where), and two models.
MEASURED = Path(__file__).parents[2] / "bench/results/cpu-amd-epyc/step-times.json"
DEMO = scenarios.measured(MEASURED, AdaptiveConfig.for_block_size(6).widths)
STEP_TIMES = [
    ("measured", DEMO, 6, 16),
    ("cpu shape", scenarios.cpu, 8, 16),
    ("gpu shape", scenarios.gpu, 16, 64),
]
WORKLOADS = [
    replace(scenario, name=f"{name}, {scenario.name}")
    for name, seconds, block_size, max_batch in STEP_TIMES
    for scenario in scenarios.build(seconds, block_size, max_batch, steps=3000)
]
SEEDS = 2
FAST = ("mix, 1 ", "jumps", "everything", "none, 1 ", "hard, 1 ")


def by_speed(scenario):
    fast = any(name in scenario.name for name in FAST)
    return pytest.param(scenario, marks=[] if fast else pytest.mark.slow, id=scenario.name)


@pytest.mark.parametrize("scenario", [by_speed(s) for s in WORKLOADS])
def test_regret_against_the_oracle_is_at_most_five_percent(scenario):
    config = AdaptiveConfig.for_block_size(scenario.block_size)
    # Runs are short: what an unlucky start costs one of them is a large share of it.
    outcomes = [simulate.run(scenario, seed=seed, config=config) for seed in range(SEEDS)]
    assert mean(outcome.regret for outcome in outcomes) <= 0.05
    assert mean(outcome.explored for outcome in outcomes) <= 0.02
