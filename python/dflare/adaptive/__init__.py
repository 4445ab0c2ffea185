"""Who proposes, and how much is verified, by load and acceptance; knows no SGLang, no torch."""

from dflare.adaptive.arms import PLAIN, Arm, chain
from dflare.adaptive.config import AdaptiveConfig
from dflare.adaptive.controller import ArmController, measure_steps
from dflare.adaptive.cost import CostTable, StepTime, save_step_times
from dflare.adaptive.lookup import LEAST_MATCH, NEVER, NO_LOOKUPS, Comparison, LookupRule
from dflare.adaptive.metrics import SpecMetrics
from dflare.adaptive.policy import ArmPolicy, Decision
from dflare.adaptive.shares import NodePrices
from dflare.adaptive.standing import Standing

__all__ = [
    "LEAST_MATCH",
    "NEVER",
    "NO_LOOKUPS",
    "PLAIN",
    "AdaptiveConfig",
    "Arm",
    "ArmController",
    "ArmPolicy",
    "Comparison",
    "CostTable",
    "Decision",
    "LookupRule",
    "NodePrices",
    "SpecMetrics",
    "Standing",
    "StepTime",
    "chain",
    "measure_steps",
    "save_step_times",
]
