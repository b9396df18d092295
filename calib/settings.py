"""How plugins are fitted, as the caller says it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from calib.arithmetic import PRECISIONS, Precision
from compexport.errors import InputError, describe
from exporter.methods.variator import PadMode

Loss = Literal["hidden", "task", "task-hidden"]
LOSSES = ("hidden", "task", "task-hidden")


def require_meant(settings: Any, positive: Sequence[str]) -> None:
    """InputError for a value that cannot be meant, of those that all kinds of training have.

    ``positive``: what must be a finite number above 0 unless it is None.
    """
    for name in positive:
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(describe(name, got=value, expected="more than 0"))
    # Adam moves each weight by about so much in a step: no weights survive more.
    if not 0 < settings.learning_rate <= 1:
        raise InputError(describe("learning_rate", got=settings.learning_rate, expected="more than 0, at most 1"))
    if settings.max_length < 4:
        raise InputError(describe("max_length", got=settings.max_length, expected="at least 4 tokens"))
    if settings.precision not in PRECISIONS:
        raise InputError(describe("unknown precision", got=settings.precision, expected=" or ".join(PRECISIONS)))


@dataclass(frozen=True)
class TrainingSettings:
    """What all trainings by passes over the data have in common; what each counts is said there.

    ``max_length`` in tokens; ``learning_rate`` is the peak; ``steps`` take the place of ``epochs``; ``max_seconds``
    ends a training early, with the learning rate brought down in time; ``batch_size`` counts the texts of one step, of
    all processes together.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 32
    max_length: int = 128
    learning_rate: float = 1e-4
    seed: int = 0
    max_seconds: float | None = None
    precision: Precision = "auto"

    def require_meant(self, *positive: str) -> None:
        """InputError for a value that cannot be meant; ``positive``: what else must be above 0 unless it is None."""
        require_meant(self, ("steps", "epochs", "batch_size", "max_seconds", *positive))

    def steps_of(self, epochs: float, rows: int) -> int:
        """How many steps so many passes over so many rows are."""
        return max(1, math.ceil(epochs * math.ceil(rows / self.batch_size)))


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
        require_meant(self, ("steps", "batch_size", "max_seconds"))
        if self.loss not in LOSSES:
            raise InputError(describe("unknown loss", got=repr(self.loss), expected=" or ".join(LOSSES)))
        return self
