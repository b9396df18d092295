"""How modules are trained, as the caller says it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calib.settings import TrainingSettings
from compexport.errors import InputError, describe
from exporter.methods.assembly import GRANULARITIES, STRATEGIES, Strategy, Tiling
from exporter.methods.modular import INIT_RULES, InitRule


@dataclass(frozen=True)
class ModularSettings(TrainingSettings):
    """How the modules of one base are trained. ``max_length`` is that of sources and of targets.

    ``base_epochs`` of fine-tuning the base come before, none where it knows the task. ``max_seconds`` ends both early,
    in proportion. ``granularities``: for how many layers a module may stand. ``init``: modules start as their span's
    first layer or its last. ``strategy`` chooses the assemblies of the ratios that are measured and named.
    """

    granularities: Tiling = GRANULARITIES
    init: InitRule = "first"
    base_epochs: float = 0.0
    strategy: Strategy = "speed-first"

    def checked(self) -> ModularSettings:
        """Itself, or InputError for a value that cannot be meant; granularities are checked with the base."""
        self.require_meant()
        if not (self.base_epochs >= 0 and math.isfinite(self.base_epochs)):
            raise InputError(describe("base_epochs", got=self.base_epochs, expected="0 or more"))
        for name, value, choices in (("init", self.init, INIT_RULES), ("strategy", self.strategy, STRATEGIES)):
            if value not in choices:
                raise InputError(describe(name, got=repr(value), expected=" or ".join(choices)))
        return self

    def steps_for(self, rows: int) -> int:
        """How many steps the modules are taught on so many rows."""
        return self.steps or self.steps_of(self.epochs, rows)

    def base_steps_for(self, rows: int) -> int:
        """How many the base is fine-tuned before."""
        return self.steps_of(self.base_epochs, rows) if self.base_epochs else 0
