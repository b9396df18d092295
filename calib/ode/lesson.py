"""One batch of training: the model in the steps that were drawn, and in all its iterations to compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib.arithmetic import to_device
from calib.batches import Batch, Collate, Rows, batches_by_length
from calib.ode.losses import state_distance
from calib.ode.objectives import Goal
from calib.progress import Progress
from exporter.methods.ode import Form, SteppedEncoder, Stepping


class Lesson(nn.Module):
    """A Hugging Face model that shares layers, with its head, run in any steps."""

    def __init__(self, model: Any, goal: Goal) -> None:
        super().__init__()
        self.model, self.goal = model, goal
        self.encoder = SteppedEncoder(model)

    @property
    def groups(self) -> tuple[int, ...]:
        """Iterations of each group."""
        return self.encoder.facts.groups

    def forward(
        self, stepping: Stepping, compared: bool, labels: Tensor, **batch: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits in these steps and, if ``compared``, how far the final states are from those of all N iterations.

        What they are compared with is computed without dropout, and not trained by the comparison.
        """
        states = self.encoder(**batch, stepping=stepping).last_hidden_state
        logits = self.logits(states, labels)
        if not compared:
            return logits, None
        return logits, state_distance(states, self._target(batch), batch["attention_mask"])

    def logits(self, states: Tensor, labels: Tensor) -> Tensor:
        """The head's answers to the final states [B,S,H], those that have a label."""
        return self.goal.logits(self.encoder.host, self.model, states, labels)

    @torch.no_grad()
    def _target(self, batch: Mapping[str, Tensor]) -> Tensor:
        training = self.model.training
        self.model.eval()
        try:
            states: Tensor = self.encoder(**batch).last_hidden_state
        finally:
            self.model.train(training)
        return states

    def loss(self, forward: nn.Module, batch: Batch, stepping: Stepping, weight: float) -> Tensor:
        """The loss of one batch that has labels; ``forward``: this lesson, or what wraps it in several processes."""
        logits, distance = forward(stepping, weight > 0 and not stepping.is_full, **batch)
        error = self.goal.error(logits, batch["labels"])
        return error if distance is None else error + weight * distance

    @torch.no_grad()
    def answers(self, batch: Batch, steps: Iterable[tuple[int, float]], form: Form) -> Tensor:
        """Logits after any ``steps`` (group, dt), which need not go as far as the model does."""
        ids, mask, types = (batch.get(name) for name in ("input_ids", "attention_mask", "token_type_ids"))
        assert ids is not None and mask is not None
        h = self.encoder.embed(ids, types)
        bias = self.encoder.attention_bias(mask, h)
        for group, dt in steps:
            h = self.encoder.step(h, bias, group, dt, form)
        return self.logits(self.encoder.close(h), batch["labels"])


def measured(
    lesson: Lesson,
    rows: Rows,
    collate: Collate,
    size: int,
    steps: Sequence[tuple[int, float]],
    form: Form,
    progress: Progress,
) -> dict[str, float]:
    """The goal's metric and the mean loss over ``rows`` in these steps, in fp32. What is masked is always the same.

    Also "asked", for how many answers, and "majority": how many of them are right that always say the commonest one.
    """
    device = next(lesson.parameters()).device
    right = total = 0
    common: Counter[int] = Counter()
    error, done = 0.0, 0
    lesson.eval()
    for number, made in enumerate(batches_by_length(rows, size, collate)):
        progress(f"measure {len(steps)} steps", done, len(rows))
        batch = lesson.goal.asked(to_device(made, device), number)
        logits, wanted = lesson.answers(batch, steps, form), lesson.goal.wanted(batch["labels"])
        right += int((logits.argmax(-1) == wanted).sum())
        error += float(lesson.goal.error(logits, batch["labels"])) * wanted.numel()
        total += wanted.numel()
        common.update(wanted.flatten().tolist())
        done += len(made["input_ids"])
    majority = max(common.values(), default=0) / max(total, 1)
    return {
        lesson.goal.metric: right / max(total, 1),
        "loss": error / max(total, 1),
        "majority": majority,
        "asked": float(total),
    }
