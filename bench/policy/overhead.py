"""Time that the width policy takes of a decode step: `python -m bench.policy.overhead`.

With warm caches, and as in a server: between two steps, and between a step's choice and its result,
a model's weights have passed through the caches.
"""

import time
from statistics import mean

import numpy as np

from dflare.adaptive import AdaptiveConfig, ArmPolicy, CostTable, StepTime

_WEIGHTS = np.zeros(8_000_000)  # 64 MB, more than a last-level cache


def measure(batch: int, block_size: int, cold: bool, steps: int = 400) -> tuple[float, float]:
    """Mean microseconds a step of choose() and observe().

    A mean, because a decision stands for several steps: most of them take next to nothing.
    """
    config = AdaptiveConfig.for_block_size(block_size)
    measured = [
        StepTime(n, a, 5e-3 + 1e-4 * n * a.nodes)
        for n in (1, 2, 4, 8, 16, 32, 64)
        for a in config.arms
    ]
    policy = ArmPolicy(config, CostTable(config.arms, measured))
    requests, remaining = [f"request {i}" for i in range(batch)], [100] * batch
    rng = np.random.default_rng(0)
    chose, observed = [], []
    for _ in range(steps):
        if cold:
            np.add(_WEIGHTS, 1, out=_WEIGHTS)
        start = time.perf_counter()
        decision = policy.choose(requests, remaining)
        chose.append(time.perf_counter() - start)
        commit = np.minimum(decision.arm.nodes, rng.geometric(0.4, batch)).tolist()
        if cold:
            np.add(_WEIGHTS, 1, out=_WEIGHTS)
        start = time.perf_counter()
        policy.observe(decision, commit, decision.predicted_seconds)
        observed.append(time.perf_counter() - start)
    return 1e6 * mean(chose), 1e6 * mean(observed)


if __name__ == "__main__":
    print("batch  block  caches  choose us  observe us")
    for batch, block_size in ((1, 8), (8, 8), (1, 16), (32, 16), (128, 16)):
        for cold in (False, True):
            choose, observe = measure(batch, block_size, cold)
            caches = "cold" if cold else "warm"
            print(f"{batch:5}  {block_size:5}  {caches:>6}  {choose:9.0f}  {observe:10.0f}")
