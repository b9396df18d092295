"""What a model in steps is asked: the class of a text, its masked tokens, or each next token.

Letters: B batch, S sequence length, H hidden size, C classes, V vocabulary, M positions that are asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calib.batches import Batch
from calib.ode.losses import IGNORED, class_error, next_tokens, token_error
from exporter.hosts import Host

MASKED = 0.15  # of the tokens, as BERT and ALBERT are pre-trained
KEPT, RANDOM = 0.1, 0.1  # of those: left as they are, replaced by any other; the rest become the mask token


class Goal(ABC):
    """One kind of question: ``metric`` names the share of right answers."""

    metric: str

    @abstractmethod
    def asked(self, batch: Batch, seed: int) -> Batch:
        """The batch with ``labels``, and with its input changed where the question is what was there."""

    @abstractmethod
    def logits(self, host: Host, model: Any, h: Tensor, labels: Tensor) -> Tensor:
        """The head's answers to final states h [B,S,H], one for each label that :meth:`wanted` gives."""

    @abstractmethod
    def wanted(self, labels: Tensor) -> Tensor:
        """The labels that have an answer, in its order."""

    def error(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The task's loss."""
        return token_error(logits, self.wanted(labels))


class Classify(Goal):
    """The class of a text."""

    metric = "accuracy"

    def asked(self, batch: Batch, seed: int) -> Batch:
        return batch

    def logits(self, host: Host, model: Any, h: Tensor, labels: Tensor) -> Tensor:
        return host.heads["sequence-classification"](model, h)

    def wanted(self, labels: Tensor) -> Tensor:
        return labels

    def error(self, logits: Tensor, labels: Tensor) -> Tensor:
        return class_error(logits, labels)


@dataclass(frozen=True)
class Unmask(Goal):
    """Tokens that were masked. ``special`` ids are never asked for; only the M asked-for positions are answered."""

    mask_id: int
    special: frozenset[int]
    vocabulary: int

    metric = "masked_accuracy"

    def asked(self, batch: Batch, seed: int) -> Batch:
        ids = batch["input_ids"]
        # Drawn on the CPU: the same on every device, and whatever else draws random numbers.
        generator = torch.Generator().manual_seed(seed)
        chance, what, other = (torch.rand(ids.shape, generator=generator) for _ in range(3))
        special = torch.isin(ids.cpu(), torch.tensor(sorted(self.special)))
        free = (batch["attention_mask"].cpu() != 0) & ~special
        chance = chance.masked_fill(~free, 2.0)
        # At least one in every row that has any.
        picked = free & ((chance < MASKED) | (chance == chance.min(1, keepdim=True).values))
        labels = torch.where(picked.to(ids.device), ids, IGNORED)
        masked = picked & (what >= KEPT + RANDOM)
        replaced = picked & (what >= KEPT) & (what < KEPT + RANDOM)
        random_ids = (other * self.vocabulary).long()
        changed = torch.where(masked, self.mask_id, torch.where(replaced, random_ids, ids.cpu()))
        return {**batch, "input_ids": changed.to(ids.device), "labels": labels}

    def logits(self, host: Host, model: Any, h: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = model.predictions(h[labels != IGNORED])
        return out

    def wanted(self, labels: Tensor) -> Tensor:
        return labels[labels != IGNORED]


class Continue(Goal):
    """Each next token of a text."""

    metric = "next_token_accuracy"

    def asked(self, batch: Batch, seed: int) -> Batch:
        return {**batch, "labels": next_tokens(batch["input_ids"], batch["attention_mask"])}

    def logits(self, host: Host, model: Any, h: Tensor, labels: Tensor) -> Tensor:
        return host.heads["text-generation"](model, h[labels != IGNORED])

    def wanted(self, labels: Tensor) -> Tensor:
        return labels[labels != IGNORED]
