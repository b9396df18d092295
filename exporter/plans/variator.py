"""Variator's plan: one graph a ratio, each a whole number of tokens merged into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from engines.manifest import ENCODER
from exporter.plans.plan import Plan, PlannedGraph

if TYPE_CHECKING:
    from exporter.graphs.family import Family


class VariatorPlan(Plan):
    """A backbone and its plugins."""

    method: ClassVar[str] = "variator"
    whole_ratios: ClassVar[bool] = True
    tensors: ClassVar[str] = "plugins"
    instead: ClassVar[str] = "or give --data here, or pass --untrained for latency work"

    def graphs(self) -> list[PlannedGraph]:
        return [PlannedGraph(f"r{ratio}", ratio, ENCODER, f"ratio {ratio}") for ratio in self.ratios]

    def facts(self, graph: PlannedGraph) -> dict[str, object]:
        return {
            "ratio": graph.ratio,
            "plugins": None if graph.ratio == 1 else self.tensors_sha256(graph.ratio),
            "pad": self.checkpoint.pad if self.checkpoint else "masked",
        }

    def load(self) -> Family[Any]:
        from exporter.graphs.variator import VariatorFamily

        return VariatorFamily.load(self)
