"""Running the stages of a plan in order, each from what another left, and keeping what they make.

What a stage made stays in the unfinished run as long as a later one builds on it: a run that was stopped goes on inside
the stage where it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib import finetune as tuning
from calib import processes
from calib.arithmetic import training_device
from calib.clock import Clock
from calib.costeff.plan import ASSISTANT, FINETUNE, Stage, seconds_left
from calib.costeff.settings import CosteffSettings
from calib.costeff.slenderise import slenderise
from calib.costeff.stages import WARM_UP_SHARE, Material, measure_importance, train_stage
from calib.data import Examples
from calib.learners import open_learner
from calib.progress import Progress
from calib.unfinished import Unfinished
from exporter.backbone import Backbone, load_backbone
from exporter.methods.costeff import Attention, CosteffModel


@dataclass
class Course:
    """The stages of one family, from the model ``start``. ``records``: of the stages that are done, by name."""

    start: Backbone
    stages: Sequence[Stage]
    settings: CosteffSettings
    unfinished: Unfinished
    rows: int
    progress: Progress
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    # --- the plan's numbers

    def steps(self, stage: Stage) -> int:
        """How many steps a stage has, where no time ends it."""
        return stage.steps(self.settings, self.rows, sum(one.epochs for one in self.stages))

    def seconds(self, stage: Stage) -> float | None:
        """How long it may take."""
        spent = sum(record["seconds"] for record in self.records.values())
        return seconds_left(self.settings, self.stages, self.stages.index(stage), spent)

    # --- stage 1

    def finetune(self, training: Examples, dev: Examples) -> Backbone:
        """Teach the model that was given the labels, unless an interrupted run has; the classifier that it becomes."""
        stage = self.stages[0]
        part, folder = self.unfinished.part(stage.name), self.unfinished.backbone
        record = part.finished()
        if record is None:
            record = self._finetuned(stage, part, folder, training, dev)
        self.records[FINETUNE] = record
        return load_backbone(folder)

    def _finetuned(
        self, stage: Stage, part: Unfinished, folder: Path, training: Examples, dev: Examples
    ) -> dict[str, Any]:
        asked = self.settings
        settings = tuning.FinetuneSettings(
            steps=self.steps(stage),
            batch_size=asked.batch_size,
            max_length=asked.max_length,
            learning_rate=stage.rate,
            seed=stage.seed,
            max_seconds=self.seconds(stage),
            precision=asked.precision,
        )
        learner = open_learner(self.start.folder, training, stage.seed)
        report = _prefixed(self.progress, stage.name)
        done = tuning.finetune(
            learner, training, dev, settings=settings, unfinished=part, warm_up=WARM_UP_SHARE, progress=report
        )
        processes.by_first(lambda: done.save(folder))
        record = {name: done.record[name] for name in ("steps", "seconds", "value")}
        processes.by_first(lambda: part.finish(record))
        return record

    # --- the others

    def run(self, tuned: Backbone, material: Material) -> None:
        """Take all stages that are not done; ``tuned`` is the fine-tuned backbone."""
        self.tuned, self.material = tuned, material
        for number, stage in enumerate(self.stages):
            if stage.kind == "finetune":
                continue
            part = self.unfinished.part(stage.name)
            record = part.finished()
            self.records[stage.name] = record if record is not None else self._take(stage, part)
            processes.by_first(partial(self._drop_what_is_used_up, number))

    def model(self, name: str) -> CosteffModel:
        """What the stage ``name`` made, on the device that trains."""
        tensors = self.unfinished.part(name).result()
        model = CosteffModel.from_tensors(tensors, self.tuned, name, attention=_attention())
        return model.to(training_device())

    def _take(self, stage: Stage, part: Unfinished) -> dict[str, Any]:
        began = time.monotonic()
        student, teacher = self._student(stage), self._teacher(stage)
        clock = Clock(began, self.steps(stage), self.seconds(stage), warm_up=WARM_UP_SHARE)
        steps = train_stage(stage, student, teacher, self.material, clock, part)

        def finish() -> dict[str, Any]:
            tensors = self._pruned(stage, student, teacher) if stage.shape is not None else student.state_dict()
            seconds = time.monotonic() - clock.started
            record = {"steps": steps, "seconds": round(seconds, 2), "learning_rate": stage.rate}
            part.finish(record, tensors)
            return record

        return processes.by_first(finish)

    def _pruned(self, stage: Stage, student: CosteffModel, teacher: CosteffModel | None) -> dict[str, Tensor]:
        """What an event leaves. It ends its stage: a student that is its teacher still has no gradients to judge by."""
        assert teacher is not None and stage.shape is not None
        scores = measure_importance(stage, student, teacher, self.material)
        return slenderise(student.state_dict(), stage.shape, scores, student.facts.head_width)

    def _student(self, stage: Stage) -> CosteffModel:
        if stage.source is not None:
            return self.model(stage.source)
        torch.manual_seed(stage.seed)
        if stage.kind == "exits":
            # Nothing but the exits is trained: dense ones can make more of states that were not made for them.
            made = CosteffModel.from_backbone(self.tuned, highway_dense=True, **self._parts)
        else:
            labels = len(self.tuned.labels)
            made = CosteffModel.from_backbone(self.start, num_labels=labels, pooler_dense=False, **self._parts)
        return made.to(training_device())

    @property
    def _parts(self) -> dict[str, Any]:
        return {"mean": self.settings.pooling != "cls", "attention": _attention()}

    def _teacher(self, stage: Stage) -> CosteffModel | None:
        if stage.kind == "exits":
            return None
        if stage.kind in ("assist-hidden", "assist"):
            return self.backbone_teacher
        return self.assistant

    @cached_property
    def backbone_teacher(self) -> CosteffModel:
        """The fine-tuned backbone; only its last exit means anything."""
        return CosteffModel.from_backbone(self.tuned, attention=_attention()).to(training_device())

    @cached_property
    def assistant(self) -> CosteffModel:
        """The multi-exit model at full width, once it is trained."""
        return self.model(ASSISTANT)

    def _drop_what_is_used_up(self, number: int) -> None:
        """Only the tensors: what the run has done is known from the records."""
        done, later = self.stages[: number + 1], self.stages[number + 1 :]
        needed = {ASSISTANT, *(stage.source for stage in later), *(self._last_of(stage) for stage in done)}
        for stage in done:
            if stage.name not in needed:
                self.unfinished.part(stage.name).drop_result()

    def _last_of(self, stage: Stage) -> str:
        """The stage that ends the training of the same ratio."""
        return [one.name for one in self.stages if one.ratio == stage.ratio][-1]


def tensors_of(model: CosteffModel) -> dict[str, Tensor]:
    """What is stored of a model."""
    return {name: one.detach().cpu() for name, one in model.state_dict().items()}


def _attention() -> Attention:
    """On the CPU the backward pass of fused attention takes longer than all else together."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def _prefixed(progress: Progress, name: str) -> Progress:
    def report(message: str, done: float | None = None, total: float | None = None) -> None:
        progress(f"{name}: {message}", done, total)

    return report
