"""What can be built: one plan class a method. Nothing here needs torch."""

from exporter.plans.costeff import CosteffPlan
from exporter.plans.plan import Plan, PlannedGraph
from exporter.plans.variator import VariatorPlan

PLANS: dict[str, type[Plan]] = {plan.method: plan for plan in (VariatorPlan, CosteffPlan)}

__all__ = ["PLANS", "Plan", "PlannedGraph"]
