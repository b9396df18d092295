"""One stage of training: a student, its teacher, and the loss that goes with the kind of stage.

Letters: B batch, S sequence length, H hidden size, L layers, C classes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from calib import processes
from calib.arithmetic import autocast, to_device
from calib.batches import Batch, Collate, Rows, batches_by_length
from calib.clock import Clock
from calib.costeff.importance import Importance, gradient_sums, importance, scored_weights
from calib.costeff.losses import answers_error, exit_to_exit, first_exits_error, hidden_error
from calib.costeff.plan import Kind, Stage
from calib.costeff.settings import CosteffSettings
from calib.finetune import parameter_groups
from calib.progress import Progress
from calib.trainer import Training
from calib.unfinished import Unfinished
from exporter.methods.costeff import CosteffModel, CosteffOutput

WARM_UP_SHARE = 0.1
# Of an event's steps that only mend the hidden states; the official share, but for tasks of a few thousand rows: 0.5.
HIDDEN_SHARE = 0.7
EXITS = ".highway."  # what the names of the exits' tensors hold, and no other

# (student, teacher, batch's mask, labels) -> loss
StageLoss = Callable[[CosteffOutput, CosteffOutput, Tensor, Tensor], Tensor]


class Lesson(nn.Module):
    """A student and its teacher on the same batch; only the student is trained.

    Without a teacher, exits learn from the student's own last one, and nothing but they is trained.
    """

    def __init__(self, student: CosteffModel, teacher: CosteffModel | None) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        if teacher is not None:
            student.requires_grad_(True)
            teacher.requires_grad_(False)
        else:
            for name, one in student.named_parameters():
                one.requires_grad_(EXITS in name)

    def train(self, mode: bool = True) -> Lesson:
        """The teacher stays in eval mode, and so does a body that nobody trains."""
        super().train(False)
        if self.teacher is not None:
            self.student.train(mode)
        return self

    def forward(self, answers: bool = True, **batch: Tensor) -> tuple[CosteffOutput, CosteffOutput]:
        """Student and teacher on input_ids, attention_mask[, token_type_ids] [B,S].

        Without ``answers`` the student has no logits: several processes wait for the gradient of all that is given out.
        """
        student = self.student(**batch)
        if self.teacher is None:
            return CosteffOutput(student.logits[:-1], student.hidden_states), student
        if not answers:
            student = CosteffOutput([], student.hidden_states)
        with torch.no_grad():
            return student, self.teacher(**batch)


def wants_answers(kind: Kind, share: float) -> bool:
    """Whether a stage of which ``share`` is done teaches answers, and not hidden states alone."""
    return share >= HIDDEN_SHARE if kind == "slenderise" else kind not in ("assist-hidden", "hidden")


def _hidden(student: CosteffOutput, teacher: CosteffOutput, mask: Tensor, labels: Tensor) -> Tensor:
    return hidden_error(student.hidden_states, teacher.hidden_states, mask)


def _first_exits(student: CosteffOutput, teacher: CosteffOutput, mask: Tensor, labels: Tensor) -> Tensor:
    return first_exits_error(student.logits, teacher.logits[-1].detach(), labels)


def _prediction(student: CosteffOutput, teacher: CosteffOutput, mask: Tensor, labels: Tensor) -> Tensor:
    return exit_to_exit(student.logits, teacher.logits) + _hidden(student, teacher, mask, labels)


# What teaches answers, by the kind of stage.
LOSSES: dict[Kind, StageLoss] = {
    "assist": _first_exits,
    "exits": _first_exits,
    "slenderise": _prediction,
    "prediction": _prediction,
}


@dataclass(frozen=True)
class Material:
    """What every stage learns from: tokenised rows with labels, how they become batches, and the caller's wishes."""

    rows: Rows
    collate: Collate
    settings: CosteffSettings
    progress: Progress

    def batches(self, rows: Rows) -> Iterator[Batch]:
        yield from batches_by_length(rows, self.settings.batch_size, self.collate)


def train_stage(
    stage: Stage,
    student: CosteffModel,
    teacher: CosteffModel | None,
    material: Material,
    clock: Clock,
    unfinished: Unfinished | None = None,
) -> int:
    """Train ``student`` in place, and leave it in eval mode; the number of steps taken, as of ``Training.run``."""
    settings = material.settings
    lesson = Lesson(student, teacher)

    def loss(model: nn.Module, batch: Batch, step: int) -> Tensor:
        labels = batch.pop("labels")
        answers = wants_answers(stage.kind, clock.share(step))
        ours, theirs = model(answers=answers, **batch)
        wanted = LOSSES[stage.kind] if answers else _hidden
        return wanted(ours, theirs, batch["attention_mask"], labels)

    def report(message: str, done: float | None = None, total: float | None = None) -> None:
        material.progress(f"{stage.name}: {message}", done, total)

    steps = Training(
        model=lesson,
        groups=parameter_groups(lesson, stage.rate),
        loss=loss,
        rows=material.rows,
        collate=material.collate,
        clock=clock,
        batch_size=settings.batch_size,
        seed=stage.seed,
        precision=settings.precision,
        partial=not wants_answers(stage.kind, 0.0),
        unfinished=unfinished,
        progress=report,
    ).run()
    student.eval().requires_grad_(False)
    return steps


def measure_importance(
    stage: Stage, student: CosteffModel, teacher: CosteffModel, material: Material
) -> list[Importance]:
    """The scores of every layer's heads and neurons, dropout off, on ``importance_rows`` drawn by the seed."""
    count = min(material.settings.importance_rows, len(material.rows))
    rows = random.Random(stage.seed).sample(list(material.rows), count)
    student.eval().requires_grad_(True)
    weights = scored_weights(dict(student.named_parameters()))
    device = next(student.parameters()).device
    done = 0

    def losses() -> Iterator[Callable[[], Tensor]]:
        nonlocal done
        for made in material.batches(rows):
            batch = to_device(made, device)
            material.progress(f"{stage.name}: importance", done, len(rows))
            done += len(batch["labels"])
            yield partial(_importance_loss, student, teacher, batch, material.settings)

    sums = gradient_sums(weights, losses())
    student.requires_grad_(False)
    return importance(weights, sums, student.facts.head_width)


def _importance_loss(student: CosteffModel, teacher: CosteffModel, batch: Batch, settings: CosteffSettings) -> Tensor:
    labels = batch.pop("labels")
    with autocast(settings.precision):
        with torch.no_grad():
            theirs = teacher(**batch)
        ours = student(**batch)
        states = hidden_error(ours.hidden_states, theirs.hidden_states, batch["attention_mask"])
        return answers_error(ours.logits, theirs.logits, labels) + states


@torch.no_grad()
def exit_accuracies(model: CosteffModel, rows: Rows, material: Material, name: str) -> list[float]:
    """The share of rows that each exit gets right, in fp32; measured by the first process, for all."""

    def measure() -> list[float]:
        device = next(model.parameters()).device
        right, done = torch.zeros(model.facts.layers), 0
        for made in material.batches(rows):
            material.progress(f"{name}: measure", done, len(rows))
            batch = to_device(made, device)
            truth = batch.pop("labels")
            done += len(truth)
            right += torch.stack([(logits.argmax(-1) == truth).sum() for logits in model(**batch).logits]).cpu()
        return [float(hits) / len(rows) for hits in right]

    return processes.by_first(measure)
