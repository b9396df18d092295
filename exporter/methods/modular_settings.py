"""What ``compexport.json`` says of a modular checkpoint. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compexport.errors import InputError, describe
from exporter.checkpoint import MethodCheckpoint
from exporter.methods.assembly import STACKS, Assembly, ModularFacts

METHOD = "modular"
TASK = "text2text-generation"


@dataclass(frozen=True)
class ModularSettings:
    """The base's facts, how modules began, the ``training`` record, and assemblies that were given names."""

    facts: ModularFacts
    init_rule: str
    training: Mapping[str, Any] = field(default_factory=dict)
    assemblies: Mapping[str, Assembly] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON holds it; sizes and layers, which are among the facts, once more for people."""
        return {
            "granularities": {name: list(self.facts.stack(name).granularities) for name in STACKS},
            "base_layers": {name: self.facts.stack(name).layers for name in STACKS},
            "init_rule": self.init_rule,
            "facts": self.facts.document(),
            "training": dict(self.training),
            "assemblies": {name: assembly.document() for name, assembly in self.assemblies.items()},
        }

    @classmethod
    def of(cls, checkpoint: MethodCheckpoint) -> ModularSettings:
        """Of a checkpoint; InputError if it is of another method, or its assemblies are none of its base's."""
        origin, settings = f"{checkpoint.folder}/compexport.json", checkpoint.settings
        if checkpoint.method != METHOD:
            raise InputError(describe(f"{origin}: method", got=checkpoint.method, expected=METHOD))
        facts = ModularFacts.from_document(settings.get("facts"), origin)
        named = settings.get("assemblies", {})
        assemblies = {name: Assembly.from_document(tiles, f"{origin}: {name}") for name, tiles in named.items()}
        for name, assembly in assemblies.items():
            assembly.require_fit(facts, f"{origin}: assembly {name}")
        return cls(facts, str(settings.get("init_rule", "first")), settings.get("training", {}), assemblies)
