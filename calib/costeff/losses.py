"""What a slender multi-exit model learns from: its teacher's states and answers, and labels where it has no teacher.

Pure functions of tensors, temperature 1. Letters: B batch, S sequence length, H hidden size, C classes. Lists of
logits hold one [B,C] per exit, lists of states one [B,S,H] for the embeddings and one per layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LABELS_SHARE = 0.1  # of the loss whose gradients tell what is important; training exit to exit uses no labels


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of [B,C] against the teacher's probabilities, mean over rows."""
    return -(teacher.float().softmax(-1) * student.float().log_softmax(-1)).sum(-1).mean()


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean squared error of a row's real tokens, mean over rows, summed over the states."""
    weights = mask.float() / mask.sum(1, keepdim=True).clamp_min(1)
    errors = [
        ((ours.float() - theirs.float()).square().mean(-1) * weights).sum(1).mean()
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).sum()


def exit_to_exit(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Every exit learns from the teacher's exit at the same layer."""
    return torch.stack([soft_cross_entropy(a, b) for a, b in zip(student, teacher, strict=True)]).sum()


def label_error(student: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Every exit learns the labels [B]."""
    return torch.stack([F.cross_entropy(logits.float(), labels) for logits in student]).sum()


def first_exits_error(student: Sequence[Tensor], teacher: Tensor, labels: Tensor) -> Tensor:
    """Exits whose teacher has only one [B,C]: each learns from that and from the labels [B], half and half."""
    soft = torch.stack([soft_cross_entropy(logits, teacher) for logits in student]).sum()
    return (soft + label_error(student, labels)) / 2


def answers_error(student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> Tensor:
    """What is important in the answers: mostly the teacher's, a little the labels [B]."""
    return (1.0 - LABELS_SHARE) * exit_to_exit(student, teacher) + LABELS_SHARE * label_error(student, labels)
