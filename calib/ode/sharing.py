"""Teaching a model that was made to share its layers what the one that it was made of does.

Letters: B batch, S sequence length, H hidden size, L layers of the teacher, N iterations of the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from calib.costeff.losses import soft_cross_entropy
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
        ours = self.student.encoder(**batch, keep_states=True)
        with torch.no_grad():
            theirs = self.teacher.encoder(**batch, keep_states=True)
        mask, states = batch["attention_mask"], [one.hidden_states for one in (theirs, ours)]
        distances = [state_distance(states[1][mine], states[0][yours], mask) for yours, mine in self.matched]
        loss = torch.stack(distances).mean()
        if not self.answers:
            return loss
        with torch.no_grad():
            wanted = self.teacher.logits(theirs.last_hidden_state, labels)
        return loss + soft_cross_entropy(self.student.logits(ours.last_hidden_state, labels), wanted)
