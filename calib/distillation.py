"""Teaching plugins: the backbone's answers and hidden states as the goal, one student per ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib.batches import Batch, Rows, collate_for
from calib.clock import Clock
from calib.losses import STEPS_SHARE, batch_loss, takes_part
from calib.progress import Progress, silent
from calib.settings import FitSettings
from calib.students import Students
from calib.trainer import Training
from calib.unfinished import Unfinished
from exporter.backbone import Backbone
from exporter.methods.variator import Plugins

# Factors of the learning rate. The adapter's output side sees r small numbers, the other two hundreds of large ones.
W_IN, W_OUT, REST = 1.0, 6.0, 2.0
LOW_RANK = 2 / 3
CONTINUED = 0.5  # a further factor for plugins that have been fitted before and have less far to go
BETAS = (0.9, 0.98)


def distillation(
    backbone: Backbone,
    plugins: Mapping[int, Plugins],
    rows: Rows,
    settings: FitSettings,
    clock: Clock,
    *,
    continued: Sequence[int] = (),
    unfinished: Unfinished | None = None,
    progress: Progress = silent,
) -> Training:
    """The training of ``plugins`` (by ratio) on ``rows``; ``continued``: the ratios that were fitted before."""
    smallest = min(plugins)

    def loss(model: nn.Module, batch: Batch, step: int) -> Tensor:
        labels = batch.pop("labels", None)
        mask = batch["attention_mask"]
        taught = [ratio for ratio in plugins if takes_part(ratio, smallest, step)]
        teacher, students = model(**batch, ratios=taught)
        share = clock.share(step)
        losses = [
            batch_loss(backbone, plugins[ratio], teacher, one, mask, labels, settings.loss, share)
            for ratio, one in students.items()
        ]
        return torch.stack(losses).sum()

    return Training(
        model=Students(backbone, plugins),
        groups=parameter_groups(plugins, settings.learning_rate, continued),
        loss=loss,
        rows=rows,
        collate=collate_for(backbone),
        clock=clock,
        batch_size=settings.batch_size,
        seed=settings.seed,
        precision=settings.precision,
        betas=BETAS,
        partial=max(plugins) > STEPS_SHARE * smallest,
        unfinished=unfinished,
        progress=progress,
    )


def parameter_groups(
    plugins: Mapping[int, Plugins], learning_rate: float, continued: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """The tensors of all plugins by learning rate."""
    groups: dict[float, list[Tensor]] = {}
    for ratio, one in plugins.items():
        start = CONTINUED if ratio in continued else 1.0
        for name, parameter in one.named_parameters():
            groups.setdefault(start * _factor(name), []).append(parameter)
    return [{"params": parameters, "lr": factor * learning_rate} for factor, parameters in groups.items()]


def _factor(name: str) -> float:
    if name.startswith("low_rank."):
        return LOW_RANK
    return W_IN if name.endswith("w_in.weight") else W_OUT if name.endswith("w_out.weight") else REST
