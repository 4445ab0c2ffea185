import math
from statistics import mean

import numpy as np
import pytest
from bench.serving.report import held_out_ratios
from sweep_cells import make_sweep, record

SWEEP = make_sweep(datasets=[{"name": "easy"}])


def test_the_best_arm_is_named_by_the_other_repeats():
    rates = {"none": (10, 20, 30), "width 4": (12, 40, 8), "adaptive": (11, 21, 31)}
    records = [
        record(arm, rate=rate, repeat=repeat)
        for arm, values in rates.items()
        for repeat, rate in enumerate(values)
    ]
    # Without repeat 0 the means are 25 and 24, without 1 they are 20 and 10, without 2 15 and 26.
    assert held_out_ratios(SWEEP, records) == {1: pytest.approx([11 / 10, 21 / 20, 31 / 8])}


def test_an_arm_like_all_others_is_not_held_to_be_worse():
    rng = np.random.default_rng(0)
    datasets = [{"name": str(i)} for i in range(200)]
    sweep = make_sweep(datasets=datasets)
    records = [
        record(arm, dataset=dataset["name"], repeat=repeat, rate=100 * rng.lognormal(0, 0.1))
        for dataset in datasets
        for arm in ("none", "width 4", "adaptive")
        for repeat in range(3)
    ]
    ratios = held_out_ratios(sweep, records)[1]
    assert len(ratios) == 600
    assert mean(math.log(ratio) for ratio in ratios) == pytest.approx(0, abs=0.02)


def test_one_repeat_and_missing_arms_give_no_ratio():
    whole = [record(arm, repeat=0) for arm in ("none", "width 4", "adaptive")]
    assert held_out_ratios(SWEEP, whole) == {}
    halved = [record(arm, repeat=i) for arm in ("none", "adaptive") for i in range(3)]
    assert held_out_ratios(SWEEP, halved) == {}
    failed = [r | {"failed": "no"} for r in whole]
    assert held_out_ratios(SWEEP, failed) == {}
