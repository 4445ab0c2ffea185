import re
from pathlib import Path

from dflare.adaptive import AdaptiveConfig

GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_guide_states_the_defaults():
    stated = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", GUIDE.read_text(), re.MULTILINE))
    fields = AdaptiveConfig.model_fields
    expected = {
        name: fields[name].default
        for name in fields
        if name not in ("widths", "proposers", "trees", "lookups")
    }
    assert {name: float(value) for name, value in stated.items()} == expected
