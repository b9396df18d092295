"""How plugins are fitted, as the caller says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from calib.arithmetic import PRECISIONS, Precision
from compexport.errors import InputError, describe
from exporter.methods.variator import PadMode

Loss = Literal["hidden", "task", "task-hidden"]
LOSSES = ("hidden", "task", "task-hidden")


def require_learning_rate(value: float) -> None:
    """InputError for a peak learning rate that no weights survive: Adam moves each by about so much in a step."""
    if not 0 < value <= 1:
        raise InputError(describe("learning_rate", got=value, expected="more than 0, at most 1"))


@dataclass(frozen=True)
class FitSettings:
    """How plugins are fitted. ``max_length`` in tokens; ``learning_rate`` is the peak.

    ``max_seconds`` ends the fit early, whatever ``steps`` says, with the learning rate brought down in time; a run
    that it ends depends on the machine's speed, one that ``steps`` ends is repeated by its ``seed``. A ratio
    above twice the smallest takes part in fewer of the steps (``calib.losses.takes_part``). ``widths`` gives
    adapter widths by ratio; by default a ratio's plugins add at most 1 % to the backbone. ``batch_size`` counts the
    texts of one step, of all processes together. ``span``: merge once, before this layer (from 1), instead of around
    every feed-forward network.
    """

    steps: int = 600
    batch_size: int = 16
    max_length: int = 48
    learning_rate: float = 1.5e-3
    seed: int = 0
    loss: Loss = "hidden"
    widths: Mapping[int, int] | None = None
    pad: PadMode = "masked"
    max_seconds: float | None = None
    precision: Precision = "auto"
    span: int | None = None

    def checked(self) -> FitSettings:
        """Itself, or InputError for a value that cannot be meant."""
        for name in ("steps", "batch_size"):
            if not getattr(self, name) > 0:
                raise InputError(describe(name, got=getattr(self, name), expected="more than 0"))
        require_learning_rate(self.learning_rate)
        if self.max_length < 4:
            raise InputError(describe("max_length", got=self.max_length, expected="at least 4 tokens"))
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise InputError(describe("max_seconds", got=self.max_seconds, expected="more than 0"))
        if self.precision not in PRECISIONS:
            raise InputError(describe("unknown precision", got=self.precision, expected=" or ".join(PRECISIONS)))
        if self.loss not in LOSSES:
            raise InputError(describe("unknown loss", got=repr(self.loss), expected=" or ".join(LOSSES)))
        return self
