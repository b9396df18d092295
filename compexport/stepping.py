"""``compexport build --form`` and ``--steps``: the steps of a model that shares layers, as asked, or chosen on data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compexport.errors import InputError, describe
from compexport.present import Progress

if TYPE_CHECKING:
    from calib.data import Examples
    from exporter.checkpoint import MethodCheckpoint
    from exporter.methods.ode_stepping import Form, Stepping

AUTO = "auto"
StepLists = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Steps:
    """How a model that shares layers is run (method ode); None keeps what its checkpoint says, or equal steps.

    ``form``: "block", "sublayer", or "auto", chosen on data. ``sizes``: of the steps of each group, for the one ratio
    beside 1. ``engine``: also graphs of a single step, from which every ratio can be run in a loop.
    """

    form: str | None = None
    sizes: StepLists | None = None
    engine: bool = False


def parsed_steps(text: str) -> list[list[float]]:
    """``"3,3/2,2,2"``: the sizes of the steps, group after group; InputError names the part that is no number."""
    lists: list[list[float]] = []
    for group in text.split("/"):
        lists.append([])
        for part in group.split(","):
            try:
                lists[-1].append(float(part))
            except ValueError:
                expected = "sizes like 3,3,2,2,1,1, and / between groups"
                raise InputError(describe("--steps", got=repr(part.strip()), expected=expected)) from None
    return lists


def given_form(form: str | None) -> Form | None:
    """``--form``, None where it is to be chosen or not said; InputError for a name that is none."""
    from exporter.methods.ode_stepping import FORMS

    for known in FORMS:
        if form == known:
            return known
    if form in (None, AUTO):
        return None
    raise InputError(describe("--form", got=repr(form), expected=f"{', '.join(FORMS)} or {AUTO}"))


def given_steps(model: str | Path, lists: StepLists, ratios: Sequence[float], form: Form) -> dict[float, Stepping]:
    """``--steps`` for the one ratio beside 1; InputError where there are more, or another ratio than the lists make."""
    from exporter.methods.ode_stepping import Stepping
    from exporter.sharing import groups_of_folder

    others = sorted({ratio for ratio in ratios if ratio != 1})
    if len(others) != 1:
        got = ",".join(f"{ratio:g}" for ratio in others) or "none"
        raise InputError(describe("--steps are the steps of one ratio beside 1", got=got, expected="like --ratio 2"))
    groups = groups_of_folder(Path(model))
    stepping = Stepping(form, tuple(tuple(group) for group in lists)).require_fit(groups, "--steps")
    made = sum(groups) / stepping.n
    if abs(made - others[0]) > 0.01:
        got = f"{stepping.n} steps of {sum(groups)}"
        raise InputError(describe(f"--steps of ratio {others[0]:g}", got=got, hint=f"they are --ratio {made:.3g}"))
    return {others[0]: stepping}


def ratio_of(model: str | Path, lists: StepLists) -> float:
    """The ratio that ``--steps`` make where none is named, to two decimals."""
    from exporter.checkpoint import plain_ratio
    from exporter.sharing import groups_of_folder

    return plain_ratio(round(max(1.0, sum(groups_of_folder(Path(model))) / sum(map(len, lists))), 2))


def usual_ratios(model: str | Path, checkpoint: MethodCheckpoint | None, lists: StepLists | None) -> list[float]:
    """The ratios to build where none are named."""
    from exporter.plans import ode

    return ode.usual_ratios(Path(model), checkpoint) if lists is None else [ratio_of(model, lists)]


def plan_options(
    model: str | Path,
    checkpoint: MethodCheckpoint | None,
    ratios: Sequence[float],
    asked: Steps,
    read: Callable[[], Examples] | None,
    progress: Progress,
) -> dict[str, Any]:
    """What the plan must know of ``asked``. ``read`` gives texts to choose on; None where there are none.

    Texts alone, without a word on form or steps, mean to choose by them where ``checkpoint`` has no choice yet.
    """
    from exporter.methods.ode_stepping import form_of, listed_ratios

    form, auto = given_form(asked.form), asked.form == AUTO
    if asked.sizes is not None:
        if auto:
            raise InputError(describe("--form auto chooses the steps too", got="--steps", expected="one of the two"))
        sized = given_steps(model, asked.sizes, ratios, form or form_of(checkpoint))
        return {"form": form, "steppings": sized, "step_engine": asked.engine}
    listed = bool(listed_ratios(checkpoint))
    if auto and read is None:
        raise InputError(describe("--form auto chooses on texts", expected="--data FILE"))
    if read is not None and (auto or (form is None and not listed)):
        chosen = chosen_steps(model, ratios, read(), progress)
        return {"steppings": chosen, "step_engine": asked.engine}
    return {"form": form, "step_engine": asked.engine}


def chosen_steps(
    model: str | Path, ratios: Sequence[float], examples: Examples, progress: Progress
) -> dict[float, Stepping]:
    """For each ratio beside 1, the form and steps that come nearest to the whole model on ``examples``."""
    from calib.ode.choice import stepping_on
    from exporter.backbone import load_backbone

    backbone = load_backbone(model)
    chosen = {}
    for ratio in sorted({ratio for ratio in ratios if ratio != 1}):
        chosen[ratio] = stepping_on(backbone, examples, ratio, progress=progress).stepping
        sizes = "/".join(",".join(f"{dt:.3g}" for dt in group) for group in chosen[ratio].steps)
        progress(f"ratio {ratio:g}: {chosen[ratio].form} form, steps {sizes}")
    return chosen
