"""How modules are trained, as the caller says it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calib.arithmetic import Precision
from calib.settings import require_meant
from compexport.errors import InputError, describe
from exporter.methods.assembly import GRANULARITIES, STRATEGIES, Strategy, Tiling
from exporter.methods.modular import INIT_RULES, InitRule


@dataclass(frozen=True)
class ModularSettings:
    """How the modules of one base are trained. ``max_length`` in tokens, of sources and of targets.

    ``epochs`` are passes over the data; ``steps`` take their place. ``base_epochs`` of fine-tuning the base come
    before, none where it knows the task. ``max_seconds`` ends both early, in proportion. ``learning_rate`` is the peak,
    ``batch_size`` counts the pairs of one step, of all processes together. ``granularities``: for how many layers a
    module may stand. ``init``: modules start as their span's first layer or its last. ``strategy`` chooses the
    assemblies of the ratios that are measured and named.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 32
    max_length: int = 128
    learning_rate: float = 1e-4
    seed: int = 0
    max_seconds: float | None = None
    precision: Precision = "auto"
    granularities: Tiling = GRANULARITIES
    init: InitRule = "first"
    base_epochs: float = 0.0
    strategy: Strategy = "speed-first"

    def checked(self) -> ModularSettings:
        """Itself, or InputError for a value that cannot be meant; granularities are checked with the base."""
        require_meant(self, ("steps", "epochs", "batch_size", "max_seconds"))
        if not (self.base_epochs >= 0 and math.isfinite(self.base_epochs)):
            raise InputError(describe("base_epochs", got=self.base_epochs, expected="0 or more"))
        for name, value, choices in (("init", self.init, INIT_RULES), ("strategy", self.strategy, STRATEGIES)):
            if value not in choices:
                raise InputError(describe(name, got=repr(value), expected=" or ".join(choices)))
        return self

    def steps_for(self, rows: int) -> int:
        """How many steps the modules are taught on so many rows."""
        return self.steps or self._steps(self.epochs, rows)

    def base_steps_for(self, rows: int) -> int:
        """How many the base is fine-tuned before."""
        return self._steps(self.base_epochs, rows) if self.base_epochs else 0

    def _steps(self, epochs: float, rows: int) -> int:
        return max(1, math.ceil(epochs * math.ceil(rows / self.batch_size)))
