"""A drafter that hardly ever guesses right is named once, with what to look at."""

import random

from dflare.adaptive import PLAIN, SpecMetrics, chain
from dflare.adaptive.watch import ADVICE, AcceptanceWatch


def watched(rates, steps=200, requests=2):
    """What is said while first drafts are accepted with each of the rates in turn."""
    said = []
    watch = AcceptanceWatch(said.append)
    draw = random.Random(0)
    lows = []
    for rate in rates:
        for _ in range(steps):
            watch.observe([1 + (draw.random() < rate) for _ in range(requests)])
        lows.append(watch.low)
    return said, lows


def test_a_useless_drafter_is_named_once():
    said, lows = watched([0.02, 0.02, 0.02])
    assert len(said) == 1 and lows == [True] * 3
    assert said[0].startswith("hardly any draft is accepted: ") and said[0].endswith(ADVICE)


def test_the_causes_come_in_order():
    order = ["another revision", "quantised", "chat template", "thinking mode", "wrong layers"]
    places = [ADVICE.index(cause) for cause in order]
    assert places == sorted(places)


def test_a_drafter_that_fits_is_left_in_peace():
    said, lows = watched([0.45, 0.9])
    assert said == [] and lows == [False, False]


def test_it_is_noticed_later_too_and_when_it_is_over():
    said, lows = watched([0.6, 0.01, 0.6])
    assert len(said) == 1 and lows == [False, True, False]


def test_steps_without_a_draft_say_nothing():
    said = []
    metrics = SpecMetrics(None, said.append)
    for _ in range(200):
        metrics.record(PLAIN, [1])
    assert said == []


def test_few_steps_say_nothing():
    """A hard prompt alone is no sign."""
    assert watched([0.0], steps=40)[0] == []


def test_metrics_hear_it_from_every_step(monkeypatch):
    said = []
    metrics = SpecMetrics(None, said.append)
    for _ in range(200):
        metrics.record(chain(4), [1])
    assert len(said) == 1
