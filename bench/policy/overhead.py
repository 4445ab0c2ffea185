"""Time that the width policy takes of a decode step: `python bench/policy/overhead.py`."""

import time
from statistics import median

import numpy as np

from dflare.adaptive import AdaptiveConfig, CostTable, StepTime, WidthPolicy


def measure(batch: int, block_size: int, steps: int = 3000) -> tuple[float, float]:
    """Median microseconds of choose() and observe()."""
    config = AdaptiveConfig.for_block_size(block_size)
    measured = [
        StepTime(n, w, 5e-3 + 1e-4 * n * w) for n in (1, 2, 4, 8, 16, 32, 64) for w in config.widths
    ]
    policy = WidthPolicy(config, CostTable(config.widths, measured))
    requests, remaining = [f"request {i}" for i in range(batch)], [100] * batch
    rng = np.random.default_rng(0)
    chose, observed = [], []
    for _ in range(steps):
        start = time.perf_counter()
        decision = policy.choose(requests, remaining)
        chose.append(time.perf_counter() - start)
        commit = np.minimum(decision.width, rng.geometric(0.4, batch)).tolist()
        start = time.perf_counter()
        policy.observe(decision, commit, decision.predicted_seconds)
        observed.append(time.perf_counter() - start)
    return 1e6 * median(chose), 1e6 * median(observed)


if __name__ == "__main__":
    print("batch  block  choose us  observe us")
    for batch, block_size in ((1, 8), (8, 8), (1, 16), (32, 16), (128, 16)):
        choose, observe = measure(batch, block_size)
        print(f"{batch:5}  {block_size:5}  {choose:9.0f}  {observe:10.0f}")
