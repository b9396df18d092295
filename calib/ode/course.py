"""The stages of a run, one after the other: each from what another left, each gone on with where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib import processes
from calib.arithmetic import training_device
from calib.batches import Batch, Rows
from calib.clock import Clock
from calib.costeff.losses import first_exits_error
from calib.finetune import parameter_groups
from calib.ode.draws import Draws
from calib.ode.exits import ExitLesson
from calib.ode.lesson import Lesson, measured
from calib.ode.settings import OdeSettings
from calib.ode.sharing import Sharing
from calib.ode.start import Start
from calib.progress import Progress
from calib.trainer import Training
from calib.unfinished import Unfinished
from engines.atomic import staged_folder
from exporter.methods.ode import FORMS, Form, Stepping

SHARE, TRAIN, EXITS = "share", "train", "exits"  # the stages; of exits there is one for each ratio
EXITS_RATE = 1e-3  # learning rate, at least: whatever the model's own, heads start from nothing
# Of the training of a model that has not learnt its answers yet, which is ordinary. States that are all one are all
# alike: where the task says little yet, the distance alone would lead there, and nothing would lead back.
LEAD_IN = 0.3


@dataclass
class Course:
    """``shares``: how the run's steps and time are shared out among its stages, by name. ``records``: those done."""

    settings: OdeSettings
    shares: Mapping[str, float]
    unfinished: Unfinished
    progress: Progress
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def clock(self, stage: str, rows: int) -> Clock:
        """The clock of a stage that begins now."""
        share = self.shares[stage]
        whole = sum(self.shares.values())
        asked, epochs = self.settings.steps, self.settings.epochs
        steps = round(asked * share / whole if asked is not None else self.settings.steps_of(epochs, rows) * share)
        seconds = None
        if self.settings.max_seconds is not None:
            left = self.settings.max_seconds - sum(record["seconds"] for record in self.records.values())
            open_ones = sum(one for name, one in self.shares.items() if name not in self.records)
            seconds = max(left * share / open_ones, 0.001)
        return Clock(time.monotonic(), max(1, steps), seconds)

    def take(
        self,
        stage: str,
        model: nn.Module,
        start: Start,
        rows: Rows,
        loss: Callable[[nn.Module, Batch, int, float], Tensor],
        *,
        rate: float = 1.0,
    ) -> dict[str, Any]:
        """Train what of ``model`` requires gradients, and return the stage's record.

        ``loss`` is told the number of the step and the share of the stage that is done; ``rate``: of the peak learning
        rate.
        """
        clock = self.clock(stage, len(rows))

        def loss_of(model: nn.Module, batch: Batch, step: int) -> Tensor:
            return loss(model, batch, step, clock.share(step))

        def report(message: str, done: float | None = None, total: float | None = None) -> None:
            self.progress(message if stage == TRAIN else f"{stage}: {message}", done, total)

        steps = Training(
            model=model,
            groups=parameter_groups(model, rate * self.settings.learning_rate),
            loss=loss_of,
            rows=rows,
            collate=start.collate,
            clock=clock,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            precision=self.settings.precision,
            partial=True,
            unfinished=self.unfinished.part(stage),
            progress=report,
        ).run()
        return {"steps": steps, "seconds": round(time.monotonic() - clock.started, 2)}

    def finish(self, stage: str, record: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep what a stage made, and that it is done."""
        processes.by_first(lambda: self.unfinished.part(stage).finish(record, tensors))
        self.records[stage] = record

    def is_done(self, stage: str) -> bool:
        """Whether an interrupted run has taken the stage."""
        record = self.unfinished.part(stage).finished()
        if record is not None:
            self.records[stage] = record
        return record is not None

    # --- the stages

    def share(self, sharing: Sharing, start: Start, rows: Rows) -> None:
        """Teach the student what its teacher does, unless an interrupted run has."""
        student, seed = sharing.student, self.settings.seed
        if not self.is_done(SHARE):

            def loss(model: nn.Module, batch: Batch, step: int, share: float) -> Tensor:
                out: Tensor = model(**student.goal.asked(batch, _draw(seed, step)))
                return out

            record = self.take(SHARE, sharing, start, rows, loss)
            self.finish(SHARE, record, dict(student.named_parameters()))
        tensors = self.unfinished.part(SHARE).result()
        with torch.no_grad():
            for name, one in student.named_parameters():
                one.copy_(tensors[name])

    def train(self, lesson: Lesson, start: Start, rows: Rows, *, fresh: bool) -> None:
        """Train the model to be run in any of the drawn numbers of steps, and leave it in ``unfinished.backbone``.

        ``fresh``: it does not know any answers yet.
        """
        draws = Draws.of(lesson.groups, self.settings)
        seed, weight = self.settings.seed, self.settings.distance_weight

        def loss(model: nn.Module, batch: Batch, step: int, share: float) -> Tensor:
            asked = lesson.goal.asked(batch, _draw(seed, step))
            drawn = Stepping.full(lesson.groups) if fresh and share < LEAD_IN else draws.at(step)
            return lesson.loss(model, asked, drawn, weight)

        lesson.requires_grad_(True)
        record = self.take(TRAIN, lesson, start, rows, loss)
        lesson.requires_grad_(False).eval()
        processes.by_first(lambda: _write(start, self.unfinished.backbone))
        self.finish(TRAIN, record)

    def exits(self, lesson: Lesson, start: Start, rows: Rows, ratio: float, stepping: Stepping) -> ExitLesson:
        """Teach heads after every step of one ratio, unless an interrupted run has."""
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            exits = ExitLesson(lesson, stepping, len(start.learner.labels)).to(training_device())
        stage = f"{EXITS}-r{ratio}"
        if not self.is_done(stage):

            def loss(model: nn.Module, batch: Batch, step: int, share: float) -> Tensor:
                labels = batch["labels"]
                early, final = model(**batch)
                return first_exits_error(early, final.detach(), labels)

            rate = max(1.0, EXITS_RATE / self.settings.learning_rate)
            record = self.take(stage, exits, start, rows, loss, rate=rate)
            self.finish(stage, record, exits.heads.state_dict())
        exits.heads.load_state_dict(self.unfinished.part(stage).result())
        return exits


def _draw(seed: int, step: int) -> int:
    """A number for the random choices of one step in one process."""
    return seed + step * processes.count() + processes.rank()


def _write(start: Start, folder: Path) -> None:
    with staged_folder(folder) as staging:
        start.learner.write(staging)


@dataclass(frozen=True)
class Quality:
    """What the model answers in the steps of each ratio; ``dropped``: as many iterations, and none of them larger."""

    full: dict[str, float]
    stepped: dict[Form, dict[float, dict[str, float]]]
    dropped: dict[float, dict[str, float]]


def quality(
    lesson: Lesson, start: Start, rows: Rows, steppings: Mapping[float, Stepping], size: int, progress: Progress
) -> Quality:
    """Measure all of it on ``rows``, by the first process for all."""

    def one(steps: Sequence[tuple[int, float]], form: Form) -> dict[str, float]:
        return measured(lesson, rows, start.collate, size, steps, form, progress)

    def measure() -> Quality:
        full = one(list(Stepping.full(lesson.groups)), "block")
        stepped = {form: {ratio: one(list(each), form) for ratio, each in steppings.items()} for form in FORMS}
        dropped = {ratio: one([(group, 1.0) for group, _ in each], "block") for ratio, each in steppings.items()}
        return Quality(full, stepped, dropped)

    return processes.by_first(measure)
