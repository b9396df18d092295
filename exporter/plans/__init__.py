"""What can be built: one plan class a method. Nothing here needs torch."""

from pathlib import Path

from compexport.errors import InputError, describe
from exporter.checkpoint import MethodCheckpoint
from exporter.plans.costeff import CosteffPlan
from exporter.plans.ode import OdePlan
from exporter.plans.plan import Plan, PlannedGraph
from exporter.plans.variator import VariatorPlan
from exporter.sharing import may_share

DEFAULT_METHOD = "variator"
PLANS: dict[str, type[Plan]] = {plan.method: plan for plan in (VariatorPlan, CosteffPlan, OdePlan)}


def plan_of(folder: Path, method: str | None, checkpoint: MethodCheckpoint | None) -> type[Plan]:
    """The plan of the ``method`` that is named, that ``folder`` holds a checkpoint of, or that fits its model.

    InputError for a name that is no method's.
    """
    fitting = OdePlan.method if may_share(folder) else DEFAULT_METHOD
    named = method or (checkpoint.method if checkpoint is not None else fitting)
    if named not in PLANS:
        what = f"{folder}: unknown method"
        raise InputError(describe(what, got=named, expected=" or ".join(PLANS), hint="upgrade compexport"))
    return PLANS[named]


__all__ = ["PLANS", "Plan", "PlannedGraph", "plan_of"]
