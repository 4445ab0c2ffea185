import pytest
import scenarios
import simulate

from dflare.adaptive import AdaptiveConfig

SHAPES = [(scenarios.cpu, 8, 16), (scenarios.gpu, 16, 64)]
WORKLOADS = [
    scenario
    for seconds, block_size, max_batch in SHAPES
    for scenario in scenarios.build(seconds, block_size, max_batch, steps=3000)
]
FAST = ("mix, 1 ", "jumps", "everything", "none, 1 ", "hard, 1 ")


def by_speed(scenario):
    fast = any(name in scenario.name for name in FAST)
    return pytest.param(scenario, marks=[] if fast else pytest.mark.slow, id=scenario.name)


@pytest.mark.parametrize("scenario", [by_speed(s) for s in WORKLOADS])
def test_regret_against_the_oracle_is_at_most_five_percent(scenario):
    config = AdaptiveConfig.for_block_size(scenario.block_size)
    outcome = simulate.run(scenario, seed=0, config=config)
    assert outcome.regret <= 0.05
    assert outcome.explored <= 0.02
