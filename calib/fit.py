"""Fitting Variator plugins: the backbone teaches itself. Only plugin tensors get gradients, no labels are needed.

Every batch runs once through the backbone and once through each ratio. Mixers start from data, adapters small and
random. Then ``transformers.Trainer`` fits all ratios together.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calib import processes
from calib.arithmetic import moved, plain_attention
from calib.batches import tokenise
from calib.clock import Clock
from calib.data import Examples
from calib.distillation import distillation
from calib.labels import CLASSIFIERS, label_ids
from calib.measuring import MEASURED, known_labels, measure
from calib.mixer_start import start_mixers
from calib.progress import Progress, silent
from calib.settings import FitSettings, Loss
from calib.unfinished import Unfinished
from compexport.errors import InputError, describe
from exporter.backbone import Backbone
from exporter.checkpoint import MethodCheckpoint, save_checkpoint
from exporter.methods.span import SpanPlugins, default_rank, require_span
from exporter.methods.variator import Plugins, VariatorPlugins, default_width

HELD_OUT = 256  # texts, at most, kept from training to measure the result when none are given


@dataclass(frozen=True)
class FitResult:
    """Fitted plugins by ratio, in eval mode, and the ``train`` JSON document (without "output")."""

    plugins: dict[int, Plugins]
    record: dict[str, Any]
    settings: FitSettings

    def checkpoint_settings(self) -> dict[str, Any]:
        """What ``compexport.json`` keeps: all that is needed to use the plugins, and how they were made."""
        return {
            "pad": self.settings.pad,
            "activation": "tanh",
            "widths": {str(ratio): _width(plugins) for ratio, plugins in self.plugins.items()},
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
    start: Mapping[int, Plugins] | None = None,
    unfinished: Unfinished | None = None,
    progress: Progress = silent,
) -> FitResult:
    """Fit plugins for all ``ratios`` together on ``texts``, and measure them on ``held_out`` texts.

    Without ``held_out``, one text in ten (at most 256) is kept back. The metric is "cosine" (mean cosine with the
    backbone's embedding) for feature extraction, "accuracy" for classification with labels, else "agreement" with the
    backbone's own answer. Ratios in ``start`` begin with those plugins, of ``settings.pad``, which are left as they
    are. The backbone is not changed. In several processes (``calib.processes``) all must call it alike. ``unfinished``
    is where the fit is saved, and from where it goes on.

    Raises InputError for no texts, a ratio below 2, a setting out of range, or labels that the model does not have;
    CompexportError when the loss is no longer finite.
    """
    started = time.monotonic()
    settings = (settings or FitSettings()).checked()
    training, measured = with_held_out(_as_examples(texts), None if held_out is None else _as_examples(held_out))
    if not ratios or min(ratios) < 2:
        raise InputError(describe("ratios to fit", got=list(ratios), expected="whole numbers of 2 or more"))
    if settings.span is not None:
        require_span(backbone, settings.span - 1)
    classes = _label_ids(backbone, training, settings.loss)
    known_labels(backbone, measured)  # a label that is none is said now, and not after the fit
    start = {ratio: one for ratio, one in (start or {}).items() if ratio in ratios}
    clock = Clock(started, settings.steps, settings.max_seconds)
    with torch.random.fork_rng(), plain_attention(backbone.model), moved(backbone.model) as device:
        torch.manual_seed(settings.seed)
        progress("tokenise")
        rows = tokenise(backbone, training, settings.max_length, classes)
        plugins = {ratio: _first(backbone, ratio, settings, start).to(device) for ratio in ratios}
        fresh = {
            ratio: one for ratio, one in plugins.items() if ratio not in start and isinstance(one, VariatorPlugins)
        }
        if fresh and (unfinished is None or unfinished.latest() is None):
            start_mixers(backbone, fresh, rows, settings, device, progress)
        steps = distillation(
            backbone, plugins, rows, settings, clock, continued=list(start), unfinished=unfinished, progress=progress
        ).run()
        progress("measure")
        result = {ratio: one.eval().requires_grad_(False) for ratio, one in plugins.items()}
        metric, teacher, student = processes.by_first(lambda: measure(backbone, result, measured, settings))
        result = {ratio: one.cpu() for ratio, one in result.items()}
    extra = {str(ratio): one.params for ratio, one in result.items()}
    record = {
        "method": "variator",
        "ratios": sorted(result),
        "extra_params": extra,
        "extra_params_share": {ratio: count / backbone.params for ratio, count in extra.items()},
        "steps": steps,
        "seconds": round(time.monotonic() - clock.started, 2),
        "metric": metric,
        "teacher": teacher,
        "student": {str(ratio): value for ratio, value in student.items()},
        "texts": len(training),
        "held_out": min(len(measured), MEASURED),
        "continued": sorted(start),
        "separately": False,
    }
    return FitResult(result, record, settings)


def fit_separately(
    backbone: Backbone,
    texts: Examples | Sequence[str],
    ratios: Sequence[int],
    *,
    settings: FitSettings,
    unfinished: Unfinished | None = None,
    progress: Progress = silent,
    **options: Any,
) -> FitResult:
    """``fit_variator`` of one ratio after the other, each with all the steps; ``max_seconds`` are for all of them.

    Options and errors as of ``fit_variator``. "steps" of the record are those of the ratio that took most.
    """
    results: list[FitResult] = []
    for number, ratio in enumerate(ratios):
        alone = settings
        if settings.max_seconds is not None:
            left = settings.max_seconds - sum(one.record["seconds"] for one in results)
            alone = replace(settings, max_seconds=max(left, 1.0) / (len(ratios) - number))
        part = None if unfinished is None else unfinished.part(f"r{ratio}")
        report = _prefixed(progress, f"ratio {ratio}: ")
        results.append(
            fit_variator(backbone, texts, [ratio], settings=alone, unfinished=part, progress=report, **options)
        )
    return _together(results, settings)


def _prefixed(progress: Progress, prefix: str) -> Progress:
    def report(message: str, done: float | None = None, total: float | None = None) -> None:
        progress(prefix + message, done, total)

    return report


def _together(results: Sequence[FitResult], settings: FitSettings) -> FitResult:
    record: dict[str, Any] = {**results[0].record, "separately": True}
    for name in ("extra_params", "extra_params_share", "student"):
        record[name] = {ratio: value for one in results for ratio, value in one.record[name].items()}
    for name in ("ratios", "continued"):
        record[name] = sorted(ratio for one in results for ratio in one.record[name])
    record["steps"] = max(one.record["steps"] for one in results)
    record["seconds"] = round(sum(one.record["seconds"] for one in results), 2)
    return FitResult({ratio: plugins for one in results for ratio, plugins in one.plugins.items()}, record, settings)


def _as_examples(texts: Examples | Sequence[str]) -> Examples:
    examples = texts if isinstance(texts, Examples) else Examples(list(texts))
    if not len(examples):
        raise InputError(describe("no texts to fit on", expected="at least one"))
    return examples


def with_held_out(training: Examples, held_out: Examples | None) -> tuple[Examples, Examples]:
    """Keep texts back for measuring where none are given; fewer than ten are used for both."""
    if held_out is not None:
        return training, held_out
    kept = held_out_rows(len(training))
    if not kept:
        return training, training
    return training.take(index for index in range(len(training)) if index not in kept), training.take(kept)


def held_out_rows(rows: int) -> range:
    """Which of so many rows are kept from training, evenly spread; none of fewer than ten."""
    return range(0, rows if rows >= 10 else 0, max(10, math.ceil(rows / HELD_OUT)))


def _first(backbone: Backbone, ratio: int, settings: FitSettings, start: Mapping[int, Plugins]) -> Plugins:
    """What a ratio's fit begins with: the plugins given, or random ones."""
    if ratio in start:
        return copy.deepcopy(start[ratio]).requires_grad_(True)
    width = (settings.widths or {}).get(ratio)
    if settings.span is not None:
        first = settings.span - 1
        return SpanPlugins(backbone, ratio, first, width or default_rank(backbone, ratio, first))
    width = width or default_width(backbone, ratio)
    return VariatorPlugins(backbone.hidden_size, backbone.num_layers, ratio, width, settings.pad)


def _width(plugins: Plugins) -> int:
    return plugins.rank if isinstance(plugins, SpanPlugins) else plugins.width


def _label_ids(backbone: Backbone, examples: Examples, loss: Loss) -> list[int] | None:
    """Class numbers for a task loss; None when the loss needs none."""
    if loss == "hidden":
        return None
    if backbone.task not in CLASSIFIERS:
        expected = " or ".join(CLASSIFIERS)
        raise InputError(describe(f"loss {loss}", got=backbone.task, expected=expected, hint='use loss "hidden"'))
    if examples.labels is None:
        raise InputError(
            describe(f"loss {loss} needs labels", got="none", hint='name the column, or use loss "hidden"')
        )
    return label_ids(examples.labels, backbone.labels, examples.origin, examples.label_names)
