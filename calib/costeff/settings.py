"""How slender models are trained, as the caller says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from calib.settings import TrainingSettings
from compexport.errors import InputError, describe

Pooling = Literal["cls", "cls+mean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True)
class CosteffSettings(TrainingSettings):
    """How a family of slender models is trained.

    ``epochs`` are passes over the data in fine-tuning and in teaching the assistant; the other stages take as many more
    or fewer as in the official recipe, which has 5 on SST-2. ``steps``, of all stages together, take their place.
    ``max_seconds`` ends every stage early, in proportion. ``learning_rate`` is the peak of those two stages and of the
    last; the others have theirs in proportion.

    ``heads_per_event``: heads that leave every layer at a time; officially 1. ``importance_rows``: rows whose gradients
    tell which leave; officially all. ``joint``: at ratio 1 train the whole model with its exits, and not the exits
    alone. ``pooling``: what exits read, the first token as published or the mean of all tokens beside it.
    """

    epochs: float = 2.0
    learning_rate: float = 5e-5
    joint: bool = False
    pooling: Pooling = "cls+mean"
    heads_per_event: int = 2
    importance_rows: int = 2048

    def checked(self) -> CosteffSettings:
        """Itself, or InputError for a value that cannot be meant."""
        self.require_meant("heads_per_event", "importance_rows")
        if self.pooling not in POOLINGS:
            raise InputError(describe("pooling", got=self.pooling, expected=f"one of {', '.join(POOLINGS)}"))
        return self
