"""Fitting Variator plugins: the backbone teaches itself. Only plugin tensors get gradients, no labels are needed.

Every batch runs once through the backbone and once through each ratio. Mixers start from data, adapters small and
random. Then ``transformers.Trainer`` fits all ratios together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from calib.arithmetic import plain_attention
from calib.batches import tokenise
from calib.clock import Clock
from calib.data import Examples
from calib.labels import label_ids
from calib.measuring import MEASURED, measure
from calib.mixer_start import start_mixers
from calib.progress import Progress, silent
from calib.settings import FitSettings, Loss
from calib.trainer import run_trainer
from compexport.errors import InputError, describe
from exporter.backbone import Backbone
from exporter.checkpoint import MethodCheckpoint, save_checkpoint
from exporter.methods.variator import VariatorPlugins, default_width

HELD_OUT = 256  # texts, at most, kept from training to measure the result when none are given


@dataclass(frozen=True)
class FitResult:
    """Fitted plugins by ratio, in eval mode, and the ``train`` JSON document (without "output")."""

    plugins: dict[int, VariatorPlugins]
    record: dict[str, Any]
    settings: FitSettings

    def checkpoint_settings(self) -> dict[str, Any]:
        """What ``compexport.json`` keeps: all that is needed to use the plugins, and how they were made."""
        return {
            "pad": self.settings.pad,
            "activation": "tanh",
            "widths": {str(ratio): plugins.width for ratio, plugins in self.plugins.items()},
            "training": {**self.record, "settings": {**asdict(self.settings), "widths": None}},
        }

    def save(self, folder: str | Path, backbone: Backbone) -> MethodCheckpoint:
        """Write the method checkpoint; errors as ``exporter.checkpoint.save_checkpoint``."""
        tensors = {ratio: dict(plugins.state_dict()) for ratio, plugins in self.plugins.items()}
        return save_checkpoint(folder, backbone.folder, "variator", self.checkpoint_settings(), tensors)


def fit_variator(
    backbone: Backbone,
    texts: Examples | Sequence[str],
    ratios: Sequence[int],
    *,
    held_out: Examples | Sequence[str] | None = None,
    settings: FitSettings | None = None,
    progress: Progress = silent,
) -> FitResult:
    """Fit plugins for all ``ratios`` together on ``texts``, and measure them on ``held_out`` texts.

    Without ``held_out``, one text in ten (at most 256) is kept back. The metric is "cosine" (mean cosine with the
    backbone's embedding) for feature extraction, "accuracy" for sequence classification with labels, else
    "agreement" with the backbone's own answer. The backbone is not changed.

    Raises InputError for no texts, a ratio below 2, a setting out of range, or a task loss without usable labels;
    CompexportError when the loss is no longer finite.
    """
    started = time.monotonic()
    settings = (settings or FitSettings()).checked()
    training, measured = _split(_as_examples(texts), None if held_out is None else _as_examples(held_out))
    if not ratios or min(ratios) < 2:
        raise InputError(describe("ratios to fit", got=list(ratios), expected="whole numbers of 2 or more"))
    classes = _label_ids(backbone, training, settings.loss)
    with torch.random.fork_rng(), plain_attention(backbone):
        torch.manual_seed(settings.seed)
        progress("tokenise")
        rows = tokenise(backbone, training, settings.max_length, classes)
        plugins = {ratio: _fresh(backbone, ratio, settings) for ratio in ratios}
        clock = Clock(started, settings)
        start_mixers(backbone, plugins, rows, settings, progress)
        steps = run_trainer(backbone, plugins, rows, clock, progress)
    progress("measure")
    result = {ratio: one.eval().requires_grad_(False) for ratio, one in plugins.items()}
    metric, teacher, student = measure(backbone, result, measured, settings)
    extra = {str(ratio): one.params for ratio, one in result.items()}
    record = {
        "method": "variator",
        "ratios": sorted(result),
        "extra_params": extra,
        "extra_params_share": {ratio: count / backbone.params for ratio, count in extra.items()},
        "steps": steps,
        "seconds": round(time.monotonic() - started, 2),
        "metric": metric,
        "teacher": teacher,
        "student": {str(ratio): value for ratio, value in student.items()},
        "texts": len(training),
        "held_out": min(len(measured), MEASURED),
    }
    return FitResult(result, record, settings)


def _as_examples(texts: Examples | Sequence[str]) -> Examples:
    examples = texts if isinstance(texts, Examples) else Examples(list(texts))
    if not len(examples):
        raise InputError(describe("no texts to fit on", expected="at least one"))
    return examples


def _split(training: Examples, held_out: Examples | None) -> tuple[Examples, Examples]:
    """Keep texts back for measuring where none are given; fewer than ten are used for both."""
    if held_out is not None:
        return training, held_out
    if len(training) < 10:
        return training, training
    every = max(10, len(training) // HELD_OUT)
    kept = [index for index in range(len(training)) if index % every == 0]
    rest = [index for index in range(len(training)) if index % every]
    return training.take(rest), training.take(kept)


def _fresh(backbone: Backbone, ratio: int, settings: FitSettings) -> VariatorPlugins:
    width = (settings.widths or {}).get(ratio) or default_width(backbone, ratio)
    return VariatorPlugins(backbone.hidden_size, backbone.num_layers, ratio, width, settings.pad)


def _label_ids(backbone: Backbone, examples: Examples, loss: Loss) -> list[int] | None:
    """Class numbers for a task loss; None when the loss needs none."""
    if loss == "hidden":
        return None
    if backbone.task != "sequence-classification":
        raise InputError(
            describe(f"loss {loss}", got=backbone.task, expected="sequence-classification", hint='use loss "hidden"')
        )
    if examples.labels is None:
        raise InputError(
            describe(f"loss {loss} needs labels", got="none", hint='name the column, or use loss "hidden"')
        )
    return label_ids(examples.labels, backbone.labels, examples.origin)
