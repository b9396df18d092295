"""What a model learns from when it is run in steps. Pure functions of tensors.

Letters: B batch, S sequence length, H hidden size, C classes, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a position that is not asked for


def state_distance(states: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean-square distance of [B,S,H] from ``target``, in units of the target's own mean square.

    Over a row's real tokens (mask [B,S]), then over rows. Without the unit, how much the distance weighs would depend
    on the gain of the model's last norm.
    """
    error = _mean_square(states.float() - target.float(), mask)
    return error / _mean_square(target.float(), mask).clamp_min(torch.finfo(torch.float32).tiny)


def _mean_square(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.float() / mask.sum(1, keepdim=True).clamp_min(1)
    return (states.square().mean(-1) * weights).sum(1).mean()


def class_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of [B,C] with labels [B]."""
    return F.cross_entropy(logits.float(), labels)


def token_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of [...,V] with labels [...], over the positions that are asked for; 0 where none is."""
    flat = labels.reshape(-1)
    total = F.cross_entropy(logits.float().reshape(flat.numel(), -1), flat, ignore_index=IGNORED, reduction="sum")
    return total / flat.ne(IGNORED).sum().clamp_min(1)


def next_tokens(ids: Tensor, mask: Tensor) -> Tensor:
    """Labels [B,S] of a language model: the token that follows each, none after a row's last one."""
    following = torch.full_like(ids, IGNORED)
    following[:, :-1] = torch.where(mask[:, 1:] != 0, ids[:, 1:], IGNORED)
    return following
