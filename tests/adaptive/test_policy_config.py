import pytest

from dflare.adaptive import AdaptiveConfig
from dflare.errors import UnsupportedError


@pytest.mark.parametrize("widths", [(), (2, 4), (1, 4, 2), (1, 2, 2), (1,)])
def test_width_sets_without_a_choice_are_refused(widths):
    with pytest.raises(ValueError, match="widths"):
        AdaptiveConfig(widths=widths)


def test_a_width_beyond_the_block_is_refused():
    with pytest.raises(ValueError, match="exceeds the drafter's block size 8"):
        AdaptiveConfig.for_block_size(8, widths=(1, 16))


@pytest.mark.parametrize("block_size", range(2, 33))
def test_default_widths_reach_from_one_to_the_block(block_size):
    widths = AdaptiveConfig.for_block_size(block_size).widths
    assert (widths[0], widths[-1]) == (1, block_size)
    assert len(widths) <= 10


@pytest.mark.parametrize("value", [None, "on"])
def test_adaptive_verification_is_on_by_default(monkeypatch, value):
    monkeypatch.delenv("DFLARE_ADAPTIVE", raising=False)
    if value:
        monkeypatch.setenv("DFLARE_ADAPTIVE", value)
    assert AdaptiveConfig.from_environment(8) == AdaptiveConfig.for_block_size(8)


def test_off_means_no_policy(monkeypatch):
    monkeypatch.setenv("DFLARE_ADAPTIVE", "off")
    assert AdaptiveConfig.from_environment(8) is None


def test_the_environment_sets_fields(monkeypatch):
    monkeypatch.setenv("DFLARE_ADAPTIVE", '{"widths": [1, 4, 8], "explore": 0.02}')
    config = AdaptiveConfig.from_environment(8)
    assert config.widths == (1, 4, 8)
    assert config.explore == 0.02


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("yes", "Expecting value"),
        ("[1, 8]", "not an object"),
        ('{"width": [1, 8]}', "width: Extra inputs"),
        ('{"widths": [1, 16]}', "exceeds the drafter's block size 8"),
        ('{"explore": 2}', "explore: Input should be less than"),
    ],
)
def test_a_wrong_environment_is_refused_with_the_reason(monkeypatch, value, reason):
    monkeypatch.setenv("DFLARE_ADAPTIVE", value)
    with pytest.raises(UnsupportedError, match=f"DFLARE_ADAPTIVE=.*{reason}.*expected off, on"):
        AdaptiveConfig.from_environment(8)
