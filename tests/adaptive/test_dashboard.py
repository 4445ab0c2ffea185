import inspect
import json
import re
from pathlib import Path

from dflare.adaptive.metrics import SpecMetrics

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "dflare.json"


def test_the_dashboard_shows_every_metric_and_no_other():
    documented = set(re.findall(r"^\s+(dflare_\w+)", inspect.getdoc(SpecMetrics), re.MULTILINE))
    documented |= set(re.findall(r"^(dflare_\w+)", inspect.getdoc(SpecMetrics), re.MULTILINE))
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    shown = set(re.findall(r"dflare_\w+", queries))
    assert shown <= documented
    # The gauges of these two are for the log and for those without rate().
    assert documented - shown == {"dflare_accept_length", "dflare_verify_width"}
