"""Classifiers after every step of a model that is trained, which itself stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib.arithmetic import to_device
from calib.batches import Batch, Collate, Rows, batches_by_length
from calib.ode.lesson import Lesson
from calib.progress import Progress
from exporter.methods.ode import Stepping
from exporter.methods.ode_exits import ExitHeads


class ExitLesson(nn.Module):
    """Fresh heads on a model that is run in ``stepping``; they learn from its own answer and from the labels."""

    def __init__(self, lesson: Lesson, stepping: Stepping, classes: int) -> None:
        super().__init__()
        self.lesson, self.stepping = lesson.requires_grad_(False), stepping
        self.heads = ExitHeads(stepping.n, lesson.encoder.facts.hidden, classes)

    def train(self, mode: bool = True) -> ExitLesson:
        """The model stays in eval mode; heads have no other."""
        super().train(mode)
        self.lesson.eval()
        return self

    def forward(self, labels: Tensor, **batch: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits [B,C] after every step but the last, and the model's own."""
        with torch.no_grad():
            found = self.lesson.encoder(**batch, stepping=self.stepping, keep_states=True)
            final = self.lesson.logits(found.last_hidden_state, labels)
        states = found.hidden_states[1:-1]
        mask = batch["attention_mask"]
        return [self.heads.after(step)(h, mask) for step, h in enumerate(states, start=1)], final


@torch.no_grad()
def exit_accuracies(exits: ExitLesson, rows: Rows, collate: Collate, size: int, progress: Progress) -> list[float]:
    """The share of ``rows`` that is right after every step, the last one included, in fp32."""
    device = next(exits.parameters()).device
    right, done = torch.zeros(exits.stepping.n), 0
    exits.eval()
    for made in batches_by_length(rows, size, collate):
        progress(f"measure exits of {exits.stepping.n} steps", done, len(rows))
        batch: Batch = to_device(made, device)
        early, final = exits(**batch)
        right += torch.stack([(logits.argmax(-1) == batch["labels"]).sum() for logits in [*early, final]]).cpu()
        done += len(batch["labels"])
    return [float(hits) / len(rows) for hits in right]
