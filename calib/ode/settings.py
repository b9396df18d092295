"""How a model that shares layers is trained, as the caller says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from calib.settings import TrainingSettings
from compexport.errors import InputError, describe

Objective = Literal["classification", "mlm", "lm"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
TrainedForm = Literal["block", "sublayer", "auto"]
TRAINED_FORMS: tuple[TrainedForm, ...] = get_args(TrainedForm)


@dataclass(frozen=True)
class OdeSettings(TrainingSettings):
    """How a model is trained to be run in fewer steps than its N iterations.

    ``epochs`` are passes over the data; making an unshared model share its layers, and exits, take as many again each.
    ``steps``, of all stages together, take their place. ``max_seconds`` ends every stage early, in proportion.

    ``objective`` None: whatever model and data are for. ``form`` "auto" trains both and keeps the better one.
    ``lowest``: of each batch the number of steps is drawn between this and N; None: half of N, rounded up.
    ``distance_weight`` is that of the distance between the final states at n and at N. ``plain``: ordinary training,
    always N iterations.

    ``share``: the model shares no layers yet and is made to, with so many groups of them, each run its share of
    ``iterations``. ``from_scratch``: random weights of the model's configuration. ``exit_heads``: afterwards, at each
    ratio, classifiers after every step.
    """

    objective: Objective | None = None
    form: TrainedForm = "auto"
    lowest: int | None = None
    distance_weight: float = 1.0
    plain: bool = False
    share: int | None = None
    iterations: int | None = None
    from_scratch: bool = False
    exit_heads: bool = False

    def checked(self) -> OdeSettings:
        """Itself, or InputError for a value that cannot be meant."""
        self.require_meant("lowest", "share", "iterations")
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise InputError(describe("objective", got=self.objective, expected=f"one of {', '.join(OBJECTIVES)}"))
        if self.form not in TRAINED_FORMS:
            raise InputError(describe("form", got=self.form, expected=f"one of {', '.join(TRAINED_FORMS)}"))
        if not 0 <= self.distance_weight < float("inf"):
            raise InputError(describe("distance_weight", got=self.distance_weight, expected="0 or more"))
        if self.iterations is not None and self.share is None:
            raise InputError(describe("--iterations", got=self.iterations, expected="--share beside it"))
        if self.from_scratch and self.share is not None:
            hint = "a configuration says itself how its layers are shared"
            raise InputError(describe("--share with --from-scratch", expected="one of them", hint=hint))
        if self.plain and self.lowest is not None:
            raise InputError(describe("--plain with --fewest-steps", expected="one of them"))
        return self
