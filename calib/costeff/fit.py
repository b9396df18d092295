"""Training a family of slender multi-exit models in one run: model folder and labelled texts in, checkpoint out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib.batches import Rows, collate_for, tokenise
from calib.costeff.course import Course, tensors_of
from calib.costeff.plan import ASSISTANT, plan, results
from calib.costeff.settings import CosteffSettings
from calib.costeff.stages import EXITS, Material, exit_accuracies
from calib.data import Examples
from calib.fit import with_held_out
from calib.labels import label_ids
from calib.learners import head_fits
from calib.progress import Progress, silent
from calib.unfinished import Unfinished
from compexport.errors import InputError, describe
from exporter.backbone import Backbone, load_backbone
from exporter.checkpoint import MethodCheckpoint, save_checkpoint
from exporter.methods.costeff import CosteffModel, HostFacts, SlenderShape, require_task


@dataclass(frozen=True)
class Start:
    """A model to start from. ``finetuned``: it classifies into the labels of the data."""

    backbone: Backbone
    finetuned: bool

    @property
    def facts(self) -> HostFacts:
        return HostFacts.of(self.backbone)


def open_start(folder: str | Path, examples: Examples) -> Start:
    """The model of ``folder``; InputError where the method does not fit it, or for labels that are no classes."""
    backbone = load_backbone(folder)
    if HostFacts.of(backbone).layers < 2:
        raise InputError(describe(f"{folder}: layers", got=1, expected="at least 2, to leave after one of them"))
    if head_fits(backbone, examples):
        require_task(backbone)
        return Start(backbone, True)
    if backbone.task != "feature-extraction":
        backbone = load_backbone(folder, "feature-extraction")
    return Start(backbone, False)


@dataclass(frozen=True)
class CosteffResult:
    """The tensors of every ratio's model, on the CPU, and the ``train`` JSON document (without "output").

    ``backbone`` lies in the unfinished run where it was fine-tuned there: save before that is gone.
    """

    backbone: Backbone
    tensors: dict[float, dict[str, Tensor]]
    record: dict[str, Any]
    settings: CosteffSettings

    def save(self, folder: str | Path) -> MethodCheckpoint:
        """Write the method checkpoint; errors as ``exporter.checkpoint.save_checkpoint``."""
        # By ratio, so that what is trained later into the same folder adds to it.
        training = {ratio: self._training_of(ratio) for ratio in self.record["exits"]}
        document = {"shapes": self.record["shapes"], "training": training}
        return save_checkpoint(folder, self.backbone.folder, "costeff", document, self.tensors)

    def _training_of(self, ratio: str) -> dict[str, Any]:
        names = ("metric", "teacher", "assistant", "steps", "seconds", "texts", "held_out", "finetuned", "stages")
        return {
            "exits": self.record["exits"][ratio],
            **{name: self.record[name] for name in names},
            "settings": asdict(self.settings),
        }


def fit_costeff(
    start: Start,
    training: Examples,
    dev: Examples | None,
    targets: Mapping[float, SlenderShape],
    *,
    settings: CosteffSettings,
    unfinished: Unfinished,
    progress: Progress = silent,
) -> CosteffResult:
    """Train a model of every shape of ``targets``, by ratio, on labelled texts, and measure every exit on ``dev``.

    Without ``dev``, one text in ten (at most 256) is kept back. The folder of ``start`` is not changed. In several
    processes (``calib.processes``) all must call it alike. Raises InputError for a label that the model does not have;
    CompexportError when numbers are no longer finite.
    """
    settings = settings.checked()
    training, dev = with_held_out(training, dev)
    stages = plan(settings, start.facts, targets, finetuned=start.finetuned)
    course = Course(start.backbone, stages, settings, unfinished, len(training), progress)
    if start.finetuned:
        progress("the model classifies into these labels already: it is not fine-tuned again")
        tuned = start.backbone
    else:
        tuned = course.finetune(training, dev)
    with torch.random.fork_rng():
        progress("tokenise")
        material = Material(_rows(tuned, training, settings), collate_for(tuned), settings, progress)
        course.run(tuned, material)
        models = {ratio: course.model(name) for ratio, name in results(list(targets), settings).items()}
        quality = _quality(course, models, _rows(tuned, dev, settings))
    tensors = {ratio: _stored(model, ratio, settings) for ratio, model in models.items()}
    record = {
        "method": "costeff",
        "ratios": list(models),
        "labels": tuned.labels,
        "shapes": {str(ratio): model.shape.document() for ratio, model in models.items()},
        "sizes": {str(ratio): str(model.shape) for ratio, model in models.items()},
        **_sizes(tensors, tuned),
        "steps": sum(one["steps"] for one in course.records.values()),
        "seconds": round(sum(one["seconds"] for one in course.records.values()), 2),
        **quality,
        "texts": len(training),
        "held_out": len(dev),
        "finetuned": not start.finetuned,
        "stages": course.records,
    }
    return CosteffResult(tuned, tensors, record, settings)


def _rows(backbone: Backbone, examples: Examples, settings: CosteffSettings) -> Rows:
    if examples.labels is None:
        raise InputError(describe(f"{examples.origin}: no label column", expected="labels, to measure the accuracy"))
    classes = label_ids(examples.labels, backbone.labels, examples.origin, examples.label_names)
    return tokenise(backbone, examples, settings.max_length, classes)


def _quality(course: Course, models: Mapping[float, CosteffModel], rows: Rows) -> dict[str, Any]:
    """The accuracy of the backbone, of every exit of every ratio, and of the assistant's exits where there is one."""
    material = course.material

    def measured(model: CosteffModel, name: str) -> list[float]:
        return exit_accuracies(model.eval(), rows, material, name)

    exits = {str(ratio): measured(model, f"ratio {ratio}") for ratio, model in models.items()}
    return {
        "metric": "accuracy",
        "teacher": measured(course.backbone_teacher, "backbone")[-1],
        "student": {ratio: values[-1] for ratio, values in exits.items()},
        "exits": exits,
        "exits_mean": {ratio: sum(values) / len(values) for ratio, values in exits.items()},
        "assistant": measured(course.assistant, "assistant") if ASSISTANT in course.records else None,
    }


def _stored(model: CosteffModel, ratio: float, settings: CosteffSettings) -> dict[str, Tensor]:
    """What a checkpoint keeps of a model: beside a frozen backbone, the exits alone."""
    tensors = tensors_of(model)
    if ratio == 1 and not settings.joint:
        return {name: one for name, one in tensors.items() if EXITS in name}
    return tensors


def _sizes(tensors: Mapping[float, Mapping[str, Tensor]], backbone: Backbone) -> dict[str, Any]:
    counts = {str(ratio): sum(one.numel() for one in kept.values()) for ratio, kept in tensors.items()}
    shares = {ratio: count / backbone.params for ratio, count in counts.items()}
    return {"extra_params": counts, "extra_params_share": shares}


def run_description(
    settings: CosteffSettings,
    start: Start,
    targets: Mapping[float, SlenderShape],
    *examples: Examples | None,
) -> Mapping[str, Any]:
    """What must be the same for a run to go on where another stopped."""
    return {
        "command": "train costeff",
        "model": start.backbone.sha256,
        "data": [one.sha256() for one in examples if one is not None],
        "shapes": {str(ratio): shape.document() for ratio, shape in targets.items()},
        **asdict(settings),
    }
