"""Training a model that shares layers to be run in fewer steps, in one run: model folder and texts in, checkpoint out.

Letters: N iterations of the model, n steps taken instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.arithmetic import moved, plain_attention
from calib.data import Examples
from calib.fit import with_held_out
from calib.ode.course import TRAIN, Course, Quality, quality
from calib.ode.draws import Draws
from calib.ode.lesson import Lesson
from calib.ode.settings import OdeSettings
from calib.ode.start import objective_of, open_start
from calib.progress import Progress, silent
from calib.unfinished import Unfinished
from exporter.backbone import Backbone, load_backbone
from exporter.checkpoint import MethodCheckpoint, save_checkpoint
from exporter.identity import backbone_sha256
from exporter.methods.ode import Form, Stepping, ratios_that_work, stepping_for_ratio, warnings_of

DEFAULT_RATIOS = (2, 3, 4)


@dataclass(frozen=True)
class OdeResult:
    """A trained model that shares layers, and the ``train`` JSON document (without "output").

    ``backbone`` lies in the unfinished run: save before that is gone.
    """

    backbone: Backbone
    steppings: dict[float, Stepping]
    record: dict[str, Any]
    settings: OdeSettings

    def save(self, folder: str | Path) -> MethodCheckpoint:
        """Write the method checkpoint; errors as ``exporter.checkpoint.save_checkpoint``."""
        document = {
            "form": self.record["form"],
            "steps": {str(ratio): one.lists() for ratio, one in self.steppings.items()},
            "training": {**self.record, "settings": asdict(self.settings)},
        }
        tensors: Mapping[float, Mapping[str, Tensor]] = {}
        return save_checkpoint(folder, self.backbone.folder, "ode", document, tensors)


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
    objective = objective_of(model, training, settings.objective)
    course = Course(settings, {TRAIN: 1.0}, unfinished, progress)
    folder = unfinished.backbone if course.is_done(TRAIN) else model
    start = open_start(folder, training, objective, settings.seed)
    lesson = Lesson(start.learner.model, start.goal)
    steppings = steppings_for(lesson.groups, ratios)
    draws = Draws.of(lesson.groups, settings)
    for stepping in steppings.values():
        if stepping.n < draws.lowest:  # the others are what the model is trained for
            for line in warnings_of(stepping):
                progress(line)
    rows, measured = (start.rows(one, settings.max_length) for one in (training, dev))
    if not course.is_done(TRAIN):
        with torch.random.fork_rng(), plain_attention(start.learner.model), moved(lesson):
            torch.manual_seed(settings.seed)
            course.train(lesson, start, rows)
    found = quality(lesson, start, measured, steppings, settings.batch_size, progress)
    form = chosen_form(found, settings, start.goal.metric)
    record = {
        "method": "ode",
        "ratios": list(steppings),
        "objective": objective,
        "labels": start.learner.labels,
        "form": form,
        "iterations": sum(lesson.groups),
        "groups": list(lesson.groups),
        "fewest_steps": draws.lowest,
        "n": {str(ratio): one.n for ratio, one in steppings.items()},
        "extra_params": {str(ratio): 0 for ratio in steppings},
        "extra_params_share": {str(ratio): 0.0 for ratio in steppings},
        "steps": sum(one["steps"] for one in course.records.values()),
        "seconds": round(sum(one["seconds"] for one in course.records.values()), 2),
        **_shown(found, form, start.goal.metric),
        "texts": len(rows),
        "held_out": len(measured),
        "stages": course.records,
    }
    steppings = {ratio: Stepping(form, one.steps) for ratio, one in steppings.items()}
    return OdeResult(load_backbone(unfinished.backbone), steppings, record, settings)


def steppings_for(groups: Sequence[int], ratios: Sequence[float] | None) -> dict[float, Stepping]:
    """Equal steps for every ratio above 1; by default those of 2, 3 and 4 that leave whole numbers of steps."""
    if ratios is None:
        possible = [ratio for ratio in ratios_that_work(groups) if ratio > 1]
        ratios = [ratio for ratio in possible if ratio in DEFAULT_RATIOS] or possible[-1:]
    return {ratio: stepping_for_ratio(groups, ratio) for ratio in sorted(ratios) if ratio != 1}


def chosen_form(found: Quality, settings: OdeSettings, metric: str) -> Form:
    """The form that was trained; of both, the one with the better metric over all ratios, the block form if equal."""
    if settings.form != "auto":
        return settings.form
    total = {form: sum(one[metric] for one in by_ratio.values()) for form, by_ratio in found.stepped.items()}
    return max(total, key=lambda form: total[form])


def _shown(found: Quality, form: Form, metric: str) -> dict[str, Any]:
    """``student``: in the chosen form; ``forms``: in each; ``dropped``: plainly fewer iterations."""

    def values(by_ratio: Mapping[float, Mapping[str, float]], name: str) -> dict[str, float]:
        return {str(ratio): one[name] for ratio, one in by_ratio.items()}

    return {
        "metric": metric,
        "teacher": found.full[metric],
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
