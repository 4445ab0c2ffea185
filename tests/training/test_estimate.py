"""What a run will take is told, and refused where it does not fit, before the first step."""

import shutil

import pytest
from tiny_models import tiny_target, train_config

from dflare.training.errors import TrainingError
from dflare.training.run import estimate
from dflare.training.run.snapshot import FILE
from dflare.training.run.trainer import Trainer


def test_the_forecast_advises_where_memory_is_short():
    forecast = estimate.Estimate({"activations": 3 * 2**30}, 0.5, 0.2, 2**30)
    text = estimate.describe(forecast, steps=120, reading=0, free=2**30)
    assert "3.00 GiB" in text and "1 min for 120 steps" in text and "run.accumulate" in text
    assert "1.00 GiB a snapshot" in text and "allowed" not in text
    assert "lower" not in estimate.describe(forecast, steps=120, reading=0, free=4 * 2**30)


def test_the_forecast_of_a_time_budget_tells_both_times():
    forecast = estimate.Estimate({}, 0.5, 1.0, 100)
    text = estimate.describe(forecast, steps=2400, reading=0, free=None, max_minutes=15.0)
    assert "20 min for 2400 steps, of which 15 min are allowed: about 1800 steps" in text
    assert "allowed" not in estimate.describe(forecast, 2400, 0, None, max_minutes=25.0)
    # With 480 steps that read the target at first: 12 minutes for them, 3 for 360 others.
    text = estimate.describe(forecast, 2400, 480, None, max_minutes=15.0)
    assert "1.00 s for the target in 480 of them" in text
    assert "28 min for 2400 steps, of which 15 min are allowed: about 840 steps" in text
    text = estimate.describe(forecast, 2400, 2400, None, max_minutes=15.0)
    assert "60 min for 2400 steps, of which 15 min are allowed: about 600 steps" in text


def test_steps_whose_states_are_cached_do_not_read_the_target(folder):
    assert Trainer(train_config(folder), tiny_target()).steps_reading(6) == 6
    config = train_config(folder, data__tap_cache=str(folder / "taps"), run__steps=2)
    trainer = Trainer(config, tiny_target())
    assert trainer.steps_reading(6) == 3, "10 sequences, 4 a step"
    trainer.run()
    resumed = Trainer(config, tiny_target(), resume=True)
    assert resumed.steps_reading(6) == 1


def test_snapshots_that_will_not_fit_are_refused_before_the_first_step(folder, monkeypatch):
    trainer = Trainer(train_config(folder), tiny_target())
    size = 12 * sum(parameter.numel() for parameter in trainer.drafter.parameters())

    def with_room(room):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, room))

    with_room(2 * size - 1)
    with pytest.raises(TrainingError, match=r"run.output .*snapshots.*GiB are free.*make room"):
        trainer.run()
    assert trainer.steps_done == 0
    with_room(2 * size)
    trainer.run()
    saved = (folder / "run" / FILE).stat().st_size
    assert size < saved < 1.2 * size + 10_000
    with_room(size)  # beside the snapshot that is there, one more
    Trainer(train_config(folder, run__steps=7), tiny_target(), resume=True).run()


@pytest.mark.parametrize(
    ("changes", "of_slots", "of_tokens"),
    [
        # H = 32, feed-forward 48, q 32 wide, k and v 16, 3 taps, 2 layers, head size 8.
        ({}, 0, 2 * 2 * 16 * 32),
        ({"drafter__shared_kv": True}, 0, 2 * 2 * 16 * 32),
        ({"drafter__architecture": "dflash"}, -6, 2 * 2 * 16 * 32 + 3 * 32 * 32),
    ],
)
def test_the_forecast_counts_context_projections_by_token(folder, changes, of_slots, of_tokens):
    drafter = Trainer(train_config(folder, **changes), tiny_target()).drafter
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 8
    fusion = 2 * 3  # logits, which DFlash has none of
    expected = (2 * layer + 2 * 32 + fusion + of_slots, of_tokens)
    assert estimate.parameters_by_use(drafter) == expected
