"""How far each run of a shared layer goes: lists of step sizes, and the facts of a model that they must fit.

Needs no torch. Source: methods.md's reading of "Parameter-shared PLMs as a neural ODE" (arXiv 2310.12818), which is our
reconstruction: the trained model is Euler's method with steps of 1, and here are fewer, larger ones.
Letters: N iterations of the trained model, n steps taken instead, G groups, dt size of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from compexport.errors import InputError, describe
from exporter.checkpoint import MethodCheckpoint, plain_ratio

Form = Literal["block", "sublayer"]
FORMS: tuple[Form, ...] = get_args(Form)
DEFAULT_FORM: Form = "sublayer"  # the better one on a trained model (docs/benchmarks.md)
USUAL_RATIOS = (2, 3, 4)
RISKY_STEP = 2.0  # from here on the weight 1 - dt of the old state is at or below -1
_MEASURE = "`compexport evaluate`"
_TOLERANCE = 1e-6
_RATIO_TOLERANCE = 0.01  # a name may write 12 / 7 with two decimals


@dataclass(frozen=True)
class OdeFacts:
    """What stepping must know of a model. ``groups``: N_1, …, N_G, iterations of each group in the order they run.

    ``inner``: layers that one iteration runs, the same in every group. ``word_width``: width of the embeddings before
    they are projected to ``hidden``; ``types`` 0 where there are no token types.
    """

    groups: tuple[int, ...]
    inner: int
    hidden: int
    heads: int
    neurons: int
    word_width: int
    vocabulary: int
    positions: int
    types: int
    causal: bool

    @property
    def iterations(self) -> int:
        """N, all groups together."""
        return sum(self.groups)

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Stepping:
    """The steps of one variant: of every group, in sequence, the sizes dt of its steps, and the form of a step."""

    form: Form
    steps: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError(describe("form of a step", got=repr(self.form), expected=" or ".join(FORMS)))
        if not self.steps or not all(self.steps):
            raise InputError(describe("steps", got=self.lists(), expected="at least one for every group"))
        for dt in (dt for group in self.steps for dt in group):
            if not (math.isfinite(dt) and dt > 0):
                raise InputError(describe("size of a step", got=dt, expected="a positive number"))

    @classmethod
    def even(cls, groups: Sequence[int], n: Sequence[int], form: Form = DEFAULT_FORM) -> Stepping:
        """``n`` equal steps of each group, which together go as far as its ``groups`` iterations."""
        if len(n) != len(groups) or any(count < 1 for count in n):
            expected = f"at least one for each of {len(groups)} groups"
            raise InputError(describe("numbers of steps", got=list(n), expected=expected))
        return cls(form, tuple((total / count,) * count for total, count in zip(groups, n, strict=True)))

    @classmethod
    def full(cls, groups: Sequence[int], form: Form = DEFAULT_FORM) -> Stepping:
        """As the model was trained: every iteration a step of 1."""
        return cls.even(groups, groups, form)

    @classmethod
    def from_document(cls, form: Any, steps: Any, origin: str) -> Stepping:
        """From the lists that JSON holds; InputError names ``origin`` otherwise."""
        try:
            lists = tuple(tuple(float(dt) for dt in group) for group in steps)
        except (TypeError, ValueError) as error:
            raise InputError(describe(f"{origin}: no steps", got=steps, expected="[[dt, …] per group]")) from error
        try:
            return cls(form, lists)
        except InputError as error:
            raise InputError(f"{origin}: {error}") from error

    @property
    def n(self) -> int:
        """The number of steps, all groups together."""
        return sum(map(len, self.steps))

    @property
    def total(self) -> float:
        """How far the steps go together: N."""
        return math.fsum(dt for group in self.steps for dt in group)

    @property
    def largest(self) -> float:
        return max(map(max, self.steps))

    @property
    def is_full(self) -> bool:
        """Whether every step is 1: the original model, whatever the form."""
        return all(dt == 1 for group in self.steps for dt in group)

    def same(self, other: Stepping) -> bool:
        """Whether both compute the same: steps of 1 do in either form."""
        return self.steps == other.steps and (self.form == other.form or self.is_full)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Every step in sequence: (group, counted from 0; dt)."""
        for group, sizes in enumerate(self.steps):
            for dt in sizes:
                yield group, dt

    def lists(self) -> list[list[float]]:
        """As JSON holds them."""
        return [list(group) for group in self.steps]

    def require_fit(self, groups: Sequence[int], origin: str = "steps") -> Stepping:
        """Itself; InputError unless the steps of each group go as far as its iterations, and none across."""
        if len(self.steps) != len(groups):
            raise InputError(describe(f"{origin}: groups", got=len(self.steps), expected=len(groups)))
        for number, (sizes, total) in enumerate(zip(self.steps, groups, strict=True), start=1):
            if abs(math.fsum(sizes) - total) > _TOLERANCE:
                which = f" of group {number}" if len(groups) > 1 else ""
                got = f"{math.fsum(sizes):g} ({', '.join(f'{dt:g}' for dt in sizes)})"
                hint = f"its {total} iterations are {total} steps of 1"
                raise InputError(describe(f"{origin}: sum of the steps{which}", got=got, expected=total, hint=hint))
        return self


def stepping_for_ratio(of: OdeFacts | Sequence[int], ratio: float, form: Form = DEFAULT_FORM) -> Stepping:
    """Equal steps, ``ratio`` times fewer in each group than the model has iterations.

    ``of``: a model's facts or its groups. InputError for a ratio that leaves no whole number of steps somewhere; it
    lists those that do.
    """
    groups = of.groups if isinstance(of, OdeFacts) else tuple(of)
    counts = [total / ratio for total in groups]
    if ratio < 1 or any(count < 1 - _TOLERANCE or abs(count - round(count)) > _TOLERANCE for count in counts):
        iterations = " + ".join(map(str, groups))
        raise InputError(
            describe(
                f"no whole number of steps at ratio {ratio:g}",
                got=f"{iterations} iterations",
                expected=f"a ratio among {', '.join(f'{one:g}' for one in ratios_that_work(groups))}",
                hint="or a list of your own with `compexport build --steps`",
            )
        )
    return Stepping.even(groups, [round(count) for count in counts], form)


def ratios_that_work(groups: Sequence[int]) -> list[float]:
    """The ratios, of at most three decimals, at which every group takes a whole number of steps; ascending."""
    ratios = (groups[0] / count for count in range(groups[0], 0, -1))
    whole = (ratio for ratio in ratios if all(abs(n / ratio - round(n / ratio)) < _TOLERANCE for n in groups))
    return [plain_ratio(ratio) for ratio in whole if abs(ratio * 1000 - round(ratio * 1000)) < _TOLERANCE]


def usual_ratios_of(groups: Sequence[int]) -> list[float]:
    """The ratios to take where none are named: of the usual ones those that work, else the smallest above 1."""
    possible = [ratio for ratio in ratios_that_work(groups) if ratio > 1]
    return [ratio for ratio in possible if ratio in USUAL_RATIOS] or possible[:1]


def warnings_of(stepping: Stepping, hint: str | None = None) -> list[str]:
    """What a user should know of the steps before trusting them, one line each; ``hint``: what to do about it."""
    if stepping.largest < RISKY_STEP:
        return []
    hint = hint or f"train with `compexport train ode --fewest-steps {stepping.n}`, and measure with {_MEASURE}"
    reason = (
        f"the old state enters with weight {1 - stepping.largest:g}"
        if stepping.form == "block"
        else "each sublayer is counted that many times"
    )
    return [
        f"{stepping.n} steps instead of {stepping.total:g}: a step of {stepping.largest:g} is at least {RISKY_STEP:g}, "
        f"where {reason} and answers may be far off; {hint}"
    ]


def warnings_of_checkpoint(stepping: Stepping, checkpoint: MethodCheckpoint | None) -> list[str]:
    """The same of steps that a checkpoint may have been trained to take."""
    record = None if checkpoint is None else checkpoint.settings.get("training")
    fewest = record.get("fewest_steps") if isinstance(record, dict) else None
    trained = isinstance(fewest, int) and fewest <= stepping.n and stepping.form == form_of(checkpoint)
    return warnings_of(stepping, f"the model was trained for it: measure with {_MEASURE}" if trained else None)


def form_of(checkpoint: MethodCheckpoint | None) -> Form:
    """The form of the checkpoint's steps; the default one where it names none."""
    form: Form = DEFAULT_FORM if checkpoint is None else checkpoint.settings.get("form", DEFAULT_FORM)
    if form not in FORMS:
        assert checkpoint is not None
        what = f"{checkpoint.folder}: form of a step"
        raise InputError(describe(what, got=repr(form), expected=" or ".join(FORMS)))
    return form


def listed_ratios(checkpoint: MethodCheckpoint | None) -> list[float]:
    """The ratios whose steps the checkpoint lists; ascending."""
    return sorted(_listed(checkpoint))


def _listed(checkpoint: MethodCheckpoint | None) -> dict[float, Any]:
    """What the checkpoint lists as steps, by ratio; InputError where that is no table of ratios."""
    if checkpoint is None:
        return {}
    steps = checkpoint.settings.get("steps", {})
    try:
        return {plain_ratio(ratio): lists for ratio, lists in steps.items()}
    except (AttributeError, TypeError, ValueError) as error:
        expected = 'a table by ratio, like {"2": [[2, 2]]}'
        raise InputError(describe(f"{checkpoint.folder}: steps", got=steps, expected=expected)) from error


def described_stepping(
    checkpoint: MethodCheckpoint | None, groups: Sequence[int], ratio: float, form: Form | None = None
) -> Stepping:
    """The steps of one ratio: those that the checkpoint lists for it, otherwise even ones.

    ``form`` is by default the checkpoint's, without one ``DEFAULT_FORM``; asked for another form than the listed steps
    were chosen in, they are even. InputError where the list does not fit the model or the ratio.
    """
    own, listed = form_of(checkpoint), _listed(checkpoint).get(plain_ratio(ratio))
    if checkpoint is None or listed is None or form not in (None, own) or ratio == 1:
        return stepping_for_ratio(groups, ratio, form or own)
    origin = f"{checkpoint.folder}: steps of ratio {ratio:g}"
    found = Stepping.from_document(own, listed, origin).require_fit(groups, origin)
    if abs(found.total / found.n - ratio) > _RATIO_TOLERANCE:
        hint = f"they are ratio {found.total / found.n:g}"
        raise InputError(describe(origin, got=f"{found.n} steps of {found.total:g}", hint=hint))
    return found
