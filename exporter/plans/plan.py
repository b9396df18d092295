"""What to build, before any of it is loaded: names of variants and graphs, and the keys that tell what changed.

Nothing here needs torch: a rebuild with nothing to do imports nothing heavy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compexport.errors import InputError, describe
from engines.manifest import Precision, Variant
from exporter.checkpoint import MethodCheckpoint
from exporter.identity import backbone_sha256, graph_key, label_words_sha256

if TYPE_CHECKING:
    from exporter.graphs.family import Family


@dataclass(frozen=True)
class PlannedGraph:
    """One graph of the variant of ``ratio``. ``label`` is its name for people."""

    name: str
    ratio: float
    role: str
    label: str


@dataclass(frozen=True)
class Plan(ABC):
    """What to build; everything here enters the graphs' keys. Ratios are plain ones, ascending, the first 1."""

    folder: Path
    ratios: tuple[float, ...]
    checkpoint: MethodCheckpoint | None = None
    task: str | None = None
    precision: Precision = "fp32"
    untrained: bool = False
    seed: int = 0

    method: ClassVar[str]
    whole_ratios: ClassVar[bool] = False  # whether this method knows no others
    tensors: ClassVar[str]  # what is trained for each ratio, for messages
    instead: ClassVar[str] = "or pass --untrained for latency work"  # of training it

    def warnings(self) -> list[str]:
        """What a user should know of the plan before trusting what is built, one line each."""
        return []

    def describes(self, variants: Mapping[str, Variant]) -> bool:
        """Whether what a manifest says of variants with these graphs is what this plan would say."""
        return True

    def trained(self, ratio: float) -> bool:
        """Whether the checkpoint holds tensors for ``ratio``."""
        return self.checkpoint is not None and ratio in self.checkpoint.files

    def variant(self, ratio: float) -> str:
        """The name of a variant."""
        return f"{self.method}-r{ratio}-{self.precision}"

    @abstractmethod
    def graphs(self) -> list[PlannedGraph]:
        """All graphs, in the order they are made."""

    @abstractmethod
    def facts(self, graph: PlannedGraph) -> dict[str, object]:
        """What this graph is made from besides backbone, task and precision."""

    @abstractmethod
    def load(self) -> Family[Any]:
        """Load all that is planned; InputError as its loaders raise."""

    def roles(self, ratio: float) -> dict[str, str]:
        """Role -> graph name of one variant."""
        return {graph.role: graph.name for graph in self.graphs() if graph.ratio == ratio}

    def variants(self) -> dict[str, dict[str, str]]:
        """Name of every variant -> role -> graph name."""
        return {self.variant(ratio): self.roles(ratio) for ratio in self.ratios}

    def keys(self) -> dict[str, str]:
        """Graph name -> hash of all it is made from."""
        if not (self.folder / "config.json").is_file():
            from exporter.backbone import load_backbone

            load_backbone(self.folder)  # raises the error that says what is missing
        backbone, words = backbone_sha256(self.folder), label_words_sha256(self.folder)
        common = {"backbone": backbone, "words": words, "precision": self.precision, "task": self.task}
        return {graph.name: graph_key(**common, **self.facts(graph)) for graph in self.graphs()}

    def tensors_sha256(self, ratio: float) -> str:
        """Identity of the tensors of one ratio, trained or, by the seed, not."""
        trained = self.checkpoint is not None and self.trained(ratio)
        return self.checkpoint.sha256(ratio) if self.checkpoint and trained else f"untrained {self.seed}"

    def require_trained(self) -> None:
        """Raise InputError, which says how to train, for ratios that lack tensors and may not be random."""
        missing = [ratio for ratio in self.ratios if ratio != 1 and not self.trained(ratio)]
        if not missing or self.untrained or not (self.folder / "config.json").is_file():
            return  # a folder without a model gets its own message from load_backbone
        names = ",".join(map(str, missing))
        command = f"compexport train {self.method} {self.folder} --ratio {names} --data TEXTS -o OUT"
        raise InputError(
            describe(
                f"{self.folder}: no trained {self.tensors} for ratio {names}",
                got=f"ratios {self.checkpoint.ratios}" if self.checkpoint else "a bare model",
                hint=f"fit them with `{command}`, {self.instead}",
            )
        )
