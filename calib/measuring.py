"""How near fitted plugins come to the backbone, in PyTorch. Letters: B batch, S sequence length, H hidden size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from calib.arithmetic import to_device
from calib.batches import batches_by_length, collate_for, tokenise
from calib.data import Examples
from calib.labels import CLASSIFIERS, label_ids
from calib.losses import embedding
from calib.settings import FitSettings
from calib.students import Students
from exporter.backbone import Backbone
from exporter.methods.variator import Plugins, task_outputs

MEASURED = 256  # held-out texts, at most, that are measured


@torch.no_grad()
def measure(
    backbone: Backbone,
    plugins: Mapping[int, Plugins],
    examples: Examples,
    settings: FitSettings,
    *,
    limit: int = MEASURED,
) -> tuple[str, float, dict[int, float]]:
    """(metric, the backbone's value, each ratio's value) on the first ``limit`` of the examples, in fp32."""
    examples = examples.take(range(min(len(examples), limit)))
    labels = known_labels(backbone, examples)
    rows = tokenise(backbone, examples, settings.max_length, labels)
    model = Students(backbone, plugins).eval()
    sums: dict[int, float] = dict.fromkeys((1, *plugins), 0.0)
    count = 0
    device = next(backbone.model.parameters()).device
    for made in batches_by_length(rows, settings.batch_size, collate_for(backbone)):
        batch = to_device(made, device)
        truth = batch.pop("labels", None)
        teacher, students = model(**batch)
        for ratio, states in {1: teacher, **students}.items():
            hits = _hits(backbone, states[-1], teacher[-1], batch["attention_mask"], truth)
            sums[ratio] += float(hits.sum())
        count += len(hits)
    means = {ratio: total / count for ratio, total in sums.items()}
    metric = "cosine" if backbone.task == "feature-extraction" else "agreement" if labels is None else "accuracy"
    return metric, means.pop(1), means


def known_labels(backbone: Backbone, examples: Examples) -> list[int] | None:
    """Class numbers of the examples' labels where the answer is a class; None where answers are not measured so.

    InputError names a label that the model does not have.
    """
    if backbone.task not in CLASSIFIERS or examples.labels is None or len(backbone.labels) < 2:
        return None
    return label_ids(examples.labels, backbone.labels, examples.origin, examples.label_names)


def _hits(backbone: Backbone, student: Tensor, teacher: Tensor, mask: Tensor, truth: Tensor | None) -> Tensor:
    """One number per answer, 1 the best: a cosine, or whether the answer is right."""
    if backbone.task == "feature-extraction":
        return F.cosine_similarity(embedding(backbone, student, mask), embedding(backbone, teacher, mask))
    ours, theirs = (task_outputs(backbone, h, mask) for h in (student, teacher))
    if backbone.task == "question-answering":
        same = [_best(a, mask) == _best(b, mask) for a, b in zip(ours, theirs, strict=True)]
        return (same[0] & same[1]).float()
    wanted = theirs[0].argmax(-1) if truth is None else truth
    right = (ours[0].argmax(-1) == wanted).float()
    return right[mask.bool()] if backbone.task == "token-classification" else right


def _best(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask.bool(), -torch.inf).argmax(-1)
