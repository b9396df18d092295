"""What plugins learn from: the backbone's hidden states and answers, and labels where there are any.

Letters: B batch, S sequence length, H hidden size, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from calib.settings import Loss
from exporter.backbone import Backbone
from exporter.methods.span import SpanPlugins
from exporter.methods.variator import Plugins, pool, task_outputs

# Of the hidden-state error, in units of the teacher's variance, beside the output error, at the first step. It fades to
# nothing at the last: layers need guidance to start with, in the end only the answer counts.
HIDDEN_WEIGHT = 1.0
# What a ratio gains by a step falls with the ratio: fewer of its errors can be mended by so few parameters. Time that
# the large ones leave goes to the small ones.
STEPS_SHARE = 2.0


def batch_loss(
    backbone: Backbone,
    plugins: Plugins,
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    mask: Tensor,
    labels: Tensor | None,
    loss: Loss,
    share: float = 0.0,
) -> Tensor:
    """The loss of one ratio on one batch; ``share`` of the fit is done."""
    total = torch.zeros(())
    if loss != "task":
        guidance = HIDDEN_WEIGHT * (1.0 - share) * hidden_error(student, _goals(plugins, teacher, mask))
        total = guidance + output_error(backbone, student[-1], teacher[-1], mask)
    if loss != "hidden":
        assert labels is not None
        total = total + F.cross_entropy(task_outputs(backbone, student[-1], mask)[0].float(), labels)
    return total


def takes_part(ratio: int, smallest: int, step: int) -> bool:
    """Whether a ratio is taught in a step: ``STEPS_SHARE * smallest / ratio`` of them, evenly spread, at most all."""
    share = min(1.0, STEPS_SHARE * smallest / ratio)
    return math.floor((step + 1) * share) > math.floor(step * share)


def hidden_error(student: Sequence[Tensor], goals: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean squared error of all layers' outputs where there is a token, each in units of its goal's variance there.

    ``goals``: of the embeddings and every layer, what the output should be and the mask of its places.
    """
    errors = []
    for ours, (theirs, mask) in zip(student[1:], goals[1:], strict=True):
        real = mask.bool()
        wanted = theirs[real].float()
        errors.append(F.mse_loss(ours[real].float(), wanted) / wanted.var(0).mean().clamp_min(1e-6))
    return torch.stack(errors).mean()


def _goals(plugins: Plugins, teacher: Sequence[Tensor], mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    if isinstance(plugins, SpanPlugins):
        return plugins.goals(teacher, mask)
    return [(state, mask) for state in teacher]


def output_error(backbone: Backbone, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """How far the answer is from the backbone's: 1 - cosine of embeddings, or KL divergence of logits."""
    if backbone.task == "feature-extraction":
        return (
            1.0 - F.cosine_similarity(embedding(backbone, student, mask), embedding(backbone, teacher, mask))
        ).mean()
    ours, theirs = (task_outputs(backbone, h, mask) for h in (student, teacher))
    return torch.stack([_divergence(backbone, a, b, mask) for a, b in zip(ours, theirs, strict=True)]).mean()


def embedding(backbone: Backbone, h: Tensor, mask: Tensor) -> Tensor:
    """[B,S,H] -> [B,H]: the folder's pooling, or the mean of the real tokens where it has none."""
    if backbone.pooling is not None:
        return pool(h.float(), mask, backbone)
    weights = mask.unsqueeze(-1).float()
    return (h.float() * weights).sum(1) / weights.sum(1).clamp_min(1.0)


def _divergence(backbone: Backbone, ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher, student) per answer; logits [B,C], per token [B,S,C], or over positions [B,S]."""
    if backbone.task == "token-classification":
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    elif backbone.task == "question-answering":
        ours, theirs = (logits.float().masked_fill(~mask.bool(), -1e4) for logits in (ours, theirs))
    elif ours.shape[-1] == 1:  # regression
        return F.mse_loss(ours.float(), theirs.float())
    return F.kl_div(
        ours.float().log_softmax(-1), theirs.float().log_softmax(-1), log_target=True, reduction="batchmean"
    )
