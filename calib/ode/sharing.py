"""Teaching a model that was made to share its layers what the one that it was made of does.

Letters: B batch, S sequence length, H hidden size, L layers of the teacher, N iterations of the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from calib.batches import Batch
from calib.ode.lesson import Lesson
from calib.ode.losses import state_distance
from exporter.methods.ode_convert import shares


def matched_states(layers: int, groups: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Which state of the teacher (after so many of its ``layers``) each of the student's is compared with.

    ``groups``: iterations of each of the student's groups. The layers that a group stands for end where it ends, and
    the longer of the two runs is compared at even distances only.
    """
    ends = list(accumulate(groups, initial=0))
    for number, run in enumerate(shares(layers, len(groups))):
        points = min(len(run), groups[number])
        for point in range(1, points + 1):
            yield run.start + round(point * len(run) / points), ends[number] + round(point * groups[number] / points)


class Sharing(nn.Module):
    """A student that shares its layers and a teacher that does not, both as models in steps, on the same batch.

    ``answers``: the teacher's head knows the task, so that what it answers is taught too.
    """

    def __init__(self, student: Lesson, teacher: Lesson, *, answers: bool) -> None:
        super().__init__()
        self.student, self.teacher, self.answers = student, teacher.requires_grad_(False), answers
        self.matched = list(matched_states(sum(teacher.groups), student.groups))

    def train(self, mode: bool = True) -> Sharing:
        """The teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, labels: Tensor, **batch: Tensor) -> Tensor:
        """The loss of one batch: how far states, and answers, are from the teacher's."""
        ours, logits = _run(self.student, labels, batch)
        with torch.no_grad():
            theirs, wanted = _run(self.teacher, labels, batch)
        mask = batch["attention_mask"]
        distances = [state_distance(ours[mine], theirs[yours], mask) for yours, mine in self.matched]
        loss = torch.stack(distances).mean()
        return loss + _soft_cross_entropy(logits, wanted) if self.answers else loss


def _run(lesson: Lesson, labels: Tensor, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
    found = lesson.encoder(**batch, keep_states=True)
    return found.hidden_states, lesson.goal.logits(lesson.encoder.host, lesson.model, found.last_hidden_state, labels)


def _soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of logits [...,C] against the teacher's probabilities, mean over all that is asked."""
    return -(teacher.float().softmax(-1) * student.float().log_softmax(-1)).sum(-1).mean()
