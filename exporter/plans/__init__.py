"""What can be built: one plan class a method. Nothing here needs torch."""

from pathlib import Path

from compexport.errors import InputError, describe
from exporter.checkpoint import MethodCheckpoint
from exporter.plans.costeff import CosteffPlan
from exporter.plans.plan import Plan, PlannedGraph
from exporter.plans.variator import VariatorPlan

DEFAULT_METHOD = "variator"
PLANS: dict[str, type[Plan]] = {plan.method: plan for plan in (VariatorPlan, CosteffPlan)}


def plan_of(folder: Path, method: str | None, checkpoint: MethodCheckpoint | None) -> type[Plan]:
    """The plan of the ``method`` that is named, or that ``folder`` holds a checkpoint of; InputError for no method."""
    named = method or (checkpoint.method if checkpoint is not None else DEFAULT_METHOD)
    if named not in PLANS:
        what = f"{folder}: unknown method"
        raise InputError(describe(what, got=named, expected=" or ".join(PLANS), hint="upgrade compexport"))
    return PLANS[named]


__all__ = ["PLANS", "Plan", "PlannedGraph", "plan_of"]
