"""What modules learn from: labels, the base's answers, its hidden states and its attention scores.

Letters: B batch, S sources, T targets, Q queries, K keys, A heads, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

UNLABELLED = -100  # a place of the labels that nobody asks for


def label_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token, mean over all that are asked for; logits [B,T,V], labels [B,T]."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=UNLABELLED)


def answer_error(logits: Tensor, base: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the base's distribution of the next token, mean over the places of ``labels``."""
    asked = labels != UNLABELLED
    wanted = base[asked].float().softmax(-1)
    return F.cross_entropy(logits[asked].float(), wanted)


def attention_error(ours: Sequence[Tensor], base: Sequence[Tensor], visible: Sequence[Tensor]) -> Tensor:
    """Mean squared error of attention scores [B,A,Q,K], each pair in units of the base's variance.

    ``visible`` [B,1,Q,K]: from where to where there is a real token that may be seen. 0 where no pair is given.
    """
    errors = [torch.zeros(())]
    for student, teacher, seen in zip(ours, base, visible, strict=True):
        places = seen.expand_as(teacher)
        wanted = teacher[places].float()
        errors.append(F.mse_loss(student[places].float(), wanted) / wanted.var().clamp_min(1e-6))
    return torch.stack([one.to(errors[-1].device) for one in errors]).sum() / max(1, len(ours))
