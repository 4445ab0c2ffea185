"""The benchmark of a training step: what its parts are said to take."""

import sys
from pathlib import Path

import pytest
from tiny_models import tiny_causal_lm, train_config

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "training"))

import step

from dflare.training.data.target import Target


@pytest.mark.slow
def test_parts_are_shares_of_the_wall_time(tmp_path):
    config = train_config(tmp_path)
    step.random_data(config, 64, Path(config.data.files[0]))
    result = step.measure(config, Target(tiny_causal_lm(), (0, 1, 2)), 3)
    shares = result["shares"]
    assert set(shares) == {*step.PARTS, "rest"}
    assert all(shares[part] > 0.0 for part in ("target", "draft", "loss", "backward"))
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.01)


def test_parts_that_did_not_run_take_no_time():
    times = step.PartTimes(on_gpu=False)
    for name in ("loss", "loss", "target"):
        with times.mark(name):
            pass
    seconds = times.seconds()
    assert set(seconds) == set(step.PARTS)
    assert seconds["loss"] > 0.0 and seconds["batch"] == 0.0
