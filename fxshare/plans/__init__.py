"""What a plan is: groups of slices with ranks, what was expected of it, and what it costs."""

from fxshare.plans.outlook import Outlook, TrialResult
from fxshare.plans.plan import Group, Plan
from fxshare.plans.units import Units

__all__ = ["Group", "Outlook", "Plan", "TrialResult", "Units"]
