"""Verification width that adapts to load and acceptance; imports neither SGLang nor torch."""

from dflare.adaptive.config import AdaptiveConfig
from dflare.adaptive.controller import WidthController, measure_steps
from dflare.adaptive.cost import CostTable, StepTime, save_step_times
from dflare.adaptive.metrics import SpecMetrics
from dflare.adaptive.policy import Decision, WidthPolicy

__all__ = [
    "AdaptiveConfig",
    "CostTable",
    "Decision",
    "SpecMetrics",
    "StepTime",
    "WidthController",
    "WidthPolicy",
    "measure_steps",
    "save_step_times",
]
