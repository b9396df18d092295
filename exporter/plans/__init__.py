"""What can be built: one plan class a method. Nothing here needs torch."""

from pathlib import Path

from compexport.errors import InputError, describe
from exporter.checkpoint import MethodCheckpoint
from exporter.plans.costeff import CosteffPlan
from exporter.plans.modular import ModularPlan, writes_from_text
from exporter.plans.ode import OdePlan
from exporter.plans.plan import Plan, PlannedGraph
from exporter.plans.variator import VariatorPlan
from exporter.sharing import may_share

DEFAULT_METHOD = "variator"
PLANS: dict[str, type[Plan]] = {plan.method: plan for plan in (VariatorPlan, CosteffPlan, ModularPlan, OdePlan)}


def plan_of(folder: Path, method: str | None, checkpoint: MethodCheckpoint | None) -> type[Plan]:
    """The plan of the ``method`` that is named, that ``folder`` holds a checkpoint of, or that fits its model.

    InputError for a name that is no method's.
    """
    named = method or (checkpoint.method if checkpoint is not None else _fitting(folder))
    if named not in PLANS:
        what = f"{folder}: unknown method"
        raise InputError(describe(what, got=named, expected=" or ".join(PLANS), hint="upgrade compexport"))
    return PLANS[named]


def _fitting(folder: Path) -> str:
    """The method for a model that says nothing of one."""
    if may_share(folder):
        return OdePlan.method
    return ModularPlan.method if writes_from_text(folder) else DEFAULT_METHOD


__all__ = ["PLANS", "Plan", "PlannedGraph", "plan_of"]
