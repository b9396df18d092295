"""Training a model that shares layers to be run in fewer steps, in one run: model folder and texts in, checkpoint out.

Letters: N iterations of the model, n steps taken instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import processes
from calib.arithmetic import moved, plain_attention
from calib.batches import Rows
from calib.data import Examples
from calib.fit import with_held_out
from calib.ode.course import EXITS, SHARE, TRAIN, Course, Quality, quality
from calib.ode.draws import Draws
from calib.ode.exits import exit_accuracies
from calib.ode.lesson import Lesson
from calib.ode.settings import OdeSettings
from calib.ode.sharing import Sharing
from calib.ode.start import Start, knows_answers, objective_of, open_start, random_folder
from calib.progress import Progress, silent
from calib.unfinished import Unfinished
from compexport.errors import InputError, describe
from exporter.backbone import Backbone, load_backbone, load_config
from exporter.checkpoint import MethodCheckpoint, save_checkpoint
from exporter.identity import backbone_sha256
from exporter.methods.ode import DEFAULT_FORM, Form, Stepping, stepping_for_ratio, warnings_of
from exporter.methods.ode_convert import shared_folder
from exporter.methods.ode_stepping import usual_ratios_of

FIRST, TEACHER = "first", "teacher"  # folders in the unfinished run: what training starts from, and what it learns from
EXITS_SHARE = 0.5  # of the steps of the training itself, for the heads of each ratio


@dataclass(frozen=True)
class OdeResult:
    """A trained model that shares layers, and the ``train`` JSON document (without "output").

    ``backbone`` lies in the unfinished run: save before that is gone.
    """

    backbone: Backbone
    steppings: dict[float, Stepping]
    exits: dict[float, dict[str, Tensor]]
    record: dict[str, Any]
    settings: OdeSettings

    def save(self, folder: str | Path) -> MethodCheckpoint:
        """Write the method checkpoint; errors as ``exporter.checkpoint.save_checkpoint``."""
        document = {
            "form": self.record["form"],
            "steps": {str(ratio): one.lists() for ratio, one in self.steppings.items()},
            "exits": {str(ratio): list(range(1, self.steppings[ratio].n)) for ratio in self.exits},
            "training": {**self.record, "settings": asdict(self.settings)},
        }
        return save_checkpoint(folder, self.backbone.folder, "ode", document, self.exits)


def fit_ode(
    model: Path,
    training: Examples,
    dev: Examples | None,
    ratios: Sequence[float] | None,
    *,
    settings: OdeSettings,
    unfinished: Unfinished,
    progress: Progress = silent,
) -> OdeResult:
    """Train the model of the folder ``model`` on ``training`` and measure it in the steps of every ratio on ``dev``.

    Without ``dev``, one text in ten (at most 256) is kept back. The folder is not changed. In several processes
    (``calib.processes``) all must call it alike. Raises InputError for a model that shares nothing, ratios that leave
    no whole number of steps, or labels that are no classes; CompexportError when numbers are no longer finite.
    """
    settings = settings.checked()
    training, dev = with_held_out(training, dev)
    run = _opened(model, training, ratios, settings, unfinished, progress)
    lesson, start, course = run.lesson, run.start, run.course
    rows, measured = (start.rows(one, settings.max_length) for one in (training, dev))
    metric, exits = start.goal.metric, {}
    with torch.random.fork_rng(), plain_attention(start.learner.model), moved(lesson):
        torch.manual_seed(settings.seed)
        if run.teacher is not None and not course.is_done(TRAIN):
            _share(run, rows)
        if not course.is_done(TRAIN):
            course.train(lesson, start, rows, fresh=not run.answers or settings.from_scratch)
        found = quality(lesson, start, measured, run.steppings, settings.batch_size, progress)
        form = chosen_form(found, settings, metric)
        steppings = {ratio: Stepping(form, one.steps) for ratio, one in run.steppings.items()}
        if settings.exit_heads:
            for ratio, stepping in with_exits(steppings).items():
                exits[ratio] = _exits(run, rows, measured, ratio, stepping)
    backbone = load_backbone(unfinished.backbone)
    tensors = {ratio: one for ratio, (one, _) in exits.items()}
    record = {
        "method": "ode",
        "ratios": list(steppings),
        "objective": start.objective,
        "labels": start.learner.labels,
        "form": form,
        "iterations": sum(lesson.groups),
        "groups": list(lesson.groups),
        "fewest_steps": run.fewest,
        "n": {str(ratio): one.n for ratio, one in steppings.items()},
        **_sizes(steppings, tensors, backbone),
        "steps": sum(one["steps"] for one in course.records.values()),
        "seconds": round(sum(one["seconds"] for one in course.records.values()), 2),
        **_shown(found, form, metric),
        "exits": {str(ratio): accuracies for ratio, (_, accuracies) in exits.items()},
        "texts": len(rows),
        "held_out": len(measured),
        "stages": course.records,
    }
    return OdeResult(backbone, steppings, tensors, record, settings)


@dataclass(frozen=True)
class _Run:
    """What a run works with. ``teacher``: what the model was made of, where it did not share its layers before.

    ``answers``: the model's head is its own, and not a fresh one.
    """

    course: Course
    start: Start
    lesson: Lesson
    teacher: Start | None
    answers: bool
    steppings: dict[float, Stepping]
    fewest: int


def _opened(
    model: Path,
    training: Examples,
    ratios: Sequence[float] | None,
    settings: OdeSettings,
    unfinished: Unfinished,
    progress: Progress,
) -> _Run:
    """The model as far as an interrupted run has come with it, or as it is to start, and all that is asked, checked."""
    shares = {SHARE: 1.0} if settings.share is not None else {}
    course = Course(settings, {**shares, TRAIN: 1.0}, unfinished, progress)
    if settings.share is not None:
        course.is_done(SHARE)  # counted even where the training after it is done too
    teacher = None
    folder = unfinished.backbone
    if not course.is_done(TRAIN):
        folder = _first(model, training, settings, unfinished)
        if settings.share is not None:
            objective = objective_of(folder, training, settings.objective)
            teacher = open_start(unfinished.folder / TEACHER, training, objective, settings.seed)
    objective = objective_of(folder, training, settings.objective)
    start = open_start(folder, training, objective, settings.seed)
    if settings.exit_heads and objective != "classification":
        raise InputError(describe("--exit-heads", got=objective, expected="classification"))
    lesson = Lesson(start.learner.model, start.goal)
    steppings = steppings_for(lesson.groups, ratios)
    if settings.exit_heads:
        course.shares = {**course.shares, **{f"{EXITS}-r{ratio}": EXITS_SHARE for ratio in with_exits(steppings)}}
    fewest = Draws.of(lesson.groups, settings).lowest
    form: Form = DEFAULT_FORM if settings.form == "auto" else settings.form
    for stepping in steppings.values():
        if stepping.n < fewest:  # the others are what the model is trained for
            for line in warnings_of(Stepping(form, stepping.steps), f"--fewest-steps {stepping.n} trains for it"):
                progress(line)
    return _Run(course, start, lesson, teacher, knows_answers(folder, start), steppings, fewest)


def _first(model: Path, training: Examples, settings: OdeSettings, unfinished: Unfinished) -> Path:
    """The folder that training starts from: the model's own, or one that is made of it."""
    place = unfinished.folder / FIRST
    if settings.from_scratch:
        objective = objective_of(model, training, settings.objective)
        processes.by_first(lambda: random_folder(model, place, objective, settings.seed))
        return place
    if settings.share is None:
        return model
    groups, layers = settings.share, int(load_config(model).num_hidden_layers)

    def make() -> None:
        for folder, count, iterations in (
            (place, groups, settings.iterations),
            (place.with_name(TEACHER), layers, None),
        ):
            if not folder.exists():
                shared_folder(model, folder, count, iterations)

    processes.by_first(make)
    return place


def _share(run: _Run, rows: Rows) -> None:
    assert run.teacher is not None
    teacher = Lesson(run.teacher.learner.model, run.teacher.goal)
    with plain_attention(run.teacher.learner.model), moved(teacher):
        run.course.share(Sharing(run.lesson, teacher, answers=run.answers), run.start, rows)


def _exits(
    run: _Run, rows: Rows, measured: Rows, ratio: float, stepping: Stepping
) -> tuple[dict[str, Tensor], list[float]]:
    """The tensors of one ratio's heads, and how often each answers rightly."""
    course, start = run.course, run.start
    exits = course.exits(run.lesson, start, rows, ratio, stepping)
    size = course.settings.batch_size
    right = processes.by_first(lambda: exit_accuracies(exits, measured, start.collate, size, course.progress))
    return {name: one.detach().cpu() for name, one in exits.heads.state_dict().items()}, right


def _sizes(
    steppings: Mapping[float, Stepping], tensors: Mapping[float, Mapping[str, Tensor]], backbone: Backbone
) -> dict[str, Any]:
    """What is stored for each ratio beside the model: its exit heads, if it has any."""
    counts = {str(ratio): sum(one.numel() for one in tensors.get(ratio, {}).values()) for ratio in steppings}
    shares = {ratio: count / backbone.params for ratio, count in counts.items()}
    return {"extra_params": counts, "extra_params_share": shares}


def steppings_for(groups: Sequence[int], ratios: Sequence[float] | None) -> dict[float, Stepping]:
    """Equal steps for every ratio; by default those of 2, 3 and 4 that leave whole numbers of steps."""
    ratios = usual_ratios_of(groups) if ratios is None else ratios
    return {ratio: stepping_for_ratio(groups, ratio) for ratio in sorted(ratios)}


def with_exits(steppings: Mapping[float, Stepping]) -> dict[float, Stepping]:
    """Those ratios that have a step before the last one, after which to answer; InputError where none has."""
    found = {ratio: stepping for ratio, stepping in steppings.items() if stepping.n > 1}
    if not found:
        raise InputError(
            describe("--exit-heads", got="one step at every ratio", expected="a ratio of two steps or more")
        )
    return found


def chosen_form(found: Quality, settings: OdeSettings, metric: str) -> Form:
    """The form that was trained; of both, the one with the better metric over all ratios, the default one if equal."""
    if settings.form != "auto":
        return settings.form
    total = {form: sum(one[metric] for one in by_ratio.values()) for form, by_ratio in found.stepped.items()}
    return max(total, key=lambda form: (total[form], form == DEFAULT_FORM))


def _shown(found: Quality, form: Form, metric: str) -> dict[str, Any]:
    """``student``: in the chosen form; ``forms``: in each; ``dropped``: plainly fewer iterations.

    ``majority``: of always giving the commonest answer; ``learnt``: whether anything is better than that, beyond what
    two standard deviations of its count may be by chance.
    """
    majority, asked = found.full["majority"], found.full["asked"]
    best = max(one[metric] for one in (found.full, *found.stepped[form].values()))
    by_chance = 2.0 * math.sqrt(majority * (1.0 - majority) / max(asked, 1.0))

    def values(by_ratio: Mapping[float, Mapping[str, float]], name: str) -> dict[str, float]:
        return {str(ratio): one[name] for ratio, one in by_ratio.items()}

    return {
        "metric": metric,
        "teacher": found.full[metric],
        "majority": majority,
        "learnt": best > majority + by_chance,
        "student": values(found.stepped[form], metric),
        "dropped": values(found.dropped, metric),
        "forms": {name: values(by_ratio, metric) for name, by_ratio in found.stepped.items()},
        "loss": {"1": found.full["loss"], **values(found.stepped[form], "loss")},
    }


def run_description(
    settings: OdeSettings, model: Path, ratios: Sequence[float] | None, *examples: Examples | None
) -> Mapping[str, Any]:
    """What must be the same for a run to go on where another stopped."""
    return {
        "command": "train ode",
        "model": backbone_sha256(model),
        "data": [one.sha256() for one in examples if one is not None],
        "ratios": None if ratios is None else list(ratios),
        **asdict(settings),
    }
