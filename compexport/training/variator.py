"""``compexport train variator``: fitting plugins to a model, for the command and for a build that lacks them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compexport.api import DEFAULT_RATIOS, FIT, Fit, Saving, choice, quiet, whole_ratios
from compexport.errors import InputError, describe
from compexport.present import Progress
from compexport.training.job import Job, given, length

if TYPE_CHECKING:
    from calib.data import Examples
    from calib.settings import FitSettings
    from calib.unfinished import Unfinished
    from exporter.backbone import Backbone
    from exporter.checkpoint import MethodCheckpoint
    from exporter.methods.variator import Plugins

LOSSES: tuple[Literal["hidden", "task", "task-hidden"], ...] = ("hidden", "task", "task-hidden")
UNTIL_TIME_IS_UP = 1_000_000  # steps, for a fit that only a number of seconds ends


def train(job: Job) -> dict[str, Any]:
    """Fit plugins to the model, and write it with them."""
    wanted = whole_ratios(job.ratios if job.ratios is not None else DEFAULT_RATIOS)
    if not wanted:
        raise InputError(describe("nothing to fit: ratio 1 is the backbone", expected="ratios above 1, like 2,4,8"))
    job.require_checkpoint_place()
    from calib import processes

    with processes.joined():
        job.require_resumable()
        texts = job.training_rows()
        return fit_texts(
            job.model, texts, ratios=wanted, output=job.output, fit=job.fit, saving=job.saving, progress=job.progress
        )


def fit_texts(
    model: str | Path,
    texts: Examples | Sequence[str],
    *,
    ratios: Sequence[int],
    output: str | Path,
    fit: Fit = FIT,
    saving: Saving | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Fit Variator plugins on ``texts``; ``output`` may be ``model`` itself, whose own files are never changed.

    Without ``saving`` an interrupted fit leaves nothing behind.
    """
    from calib import processes
    from calib.data import Examples
    from calib.fit import fit_separately, fit_variator
    from exporter.backbone import load_backbone

    examples = texts if isinstance(texts, Examples) else Examples(list(texts))
    progress("loading the model")
    backbone = load_backbone(model, attention="sdpa")
    start, pad = _starting_plugins(backbone, ratios, fit)
    _require_one_pad(output, ratios, pad)
    settings = _fit_settings(fit, len(examples), pad)
    fitting = fit_separately if fit.separately else fit_variator
    with _kept(output, saving, backbone, examples, ratios, fit, start, settings) as state:
        result = fitting(
            backbone, examples, ratios, settings=settings, start=start, unfinished=state, progress=progress
        )
        processes.by_first(lambda: result.save(output, backbone))
    return {"output": str(output), **result.record}


@contextmanager
def _kept(
    output: str | Path,
    saving: Saving | None,
    backbone: Backbone,
    examples: Examples,
    ratios: Sequence[int],
    fit: Fit,
    start: Mapping[int, Plugins],
    settings: FitSettings,
) -> Iterator[Unfinished | None]:
    """Where a fit is kept until it is written; None where nobody wants to go on with it."""
    from calib import unfinished
    from exporter.identity import label_words_sha256

    if saving is None:
        yield None
        return
    run = {
        "command": "train variator",
        "model": backbone.sha256,
        "label_words": label_words_sha256(backbone.folder),
        "data": examples.sha256(),
        "ratios": list(ratios),
        "separately": fit.separately,
        "start": {str(ratio): _tensors_sha256(one) for ratio, one in start.items()},
        **asdict(settings),
    }
    with unfinished.keeping(Path(output), run, resume=saving.resume, save_every=saving.save_every) as state:
        yield state


def _fit_settings(fit: Fit, rows: int, pad: Literal["masked", "official"]) -> FitSettings:
    """What the caller left open takes the method's default; only time ends a fit that has no number of steps."""
    from calib.fit import held_out_rows
    from calib.settings import FitSettings

    settings = FitSettings(loss=choice("loss", fit.loss, LOSSES), pad=pad, span=fit.span, **given(fit)).checked()
    steps = length(fit).get("steps")
    if fit.epochs is not None:
        trained = rows - len(held_out_rows(rows))
        steps = math.ceil(fit.epochs * math.ceil(trained / settings.batch_size))
    elif steps is None and fit.max_seconds is not None:
        steps = UNTIL_TIME_IS_UP
    return settings if steps is None else replace(settings, steps=steps)


def _starting_plugins(
    backbone: Backbone, ratios: Sequence[int], fit: Fit
) -> tuple[dict[int, Plugins], Literal["masked", "official"]]:
    """Plugins by ratio from which a fit goes on, and how they treat padding: the model's own, or another folder's."""
    from exporter.checkpoint import find_checkpoint
    from exporter.methods.variator import plugins_from_tensors

    if fit.fresh and fit.start is not None:
        raise InputError(describe("both --fresh and --start were given", expected="one of them"))
    named = fit.start is not None
    checkpoint = find_checkpoint(fit.start, "variator") if fit.start is not None else find_checkpoint(backbone.folder)
    if checkpoint is None and named:
        raise InputError(describe(f"{fit.start}: no plugins", expected="a folder made by `compexport train`"))
    if checkpoint is None or checkpoint.method != "variator":  # a model with another method's tensors is just a model
        return {}, "masked"
    pad: Literal["masked", "official"] = "official" if checkpoint.pad == "official" else "masked"
    if fit.fresh:
        return {}, pad
    missing = [ratio for ratio in ratios if ratio not in checkpoint.files]
    if missing and named:
        got = ", ".join(map(str, checkpoint.ratios))
        raise InputError(describe(f"{fit.start}: no plugins for ratio {missing[0]}", got=got or "none"))
    found = {}
    for ratio in ratios:
        if ratio not in missing:
            origin = str(checkpoint.folder / checkpoint.files[ratio])
            tensors = checkpoint.load(ratio)
            found[ratio] = plugins_from_tensors(tensors, backbone, pad, origin)
            _require_form(found[ratio], fit.span, origin)
    return found, pad


def span_of(checkpoint: MethodCheckpoint | None) -> int | None:
    """Where the spans of a folder begin, as its last training says: ratios that are added get the same form."""
    if checkpoint is None:
        return None
    span = checkpoint.settings.get("training", {}).get("settings", {}).get("span")
    return int(span) if span is not None else None


def _require_form(plugins: Plugins, span: int | None, origin: str) -> None:
    """InputError for a fit that would begin with plugins of the other form, or of another span."""
    from exporter.methods.span import SpanPlugins

    there = plugins.first + 1 if isinstance(plugins, SpanPlugins) else None
    if there != span:
        names = [
            "plugins around every feed-forward network" if one is None else f"--span {one}" for one in (there, span)
        ]
        hint = "use --fresh, or the same --span"
        raise InputError(describe(f"{origin}: other plugins", got=names[0], expected=names[1], hint=hint))


def _tensors_sha256(plugins: Plugins) -> str:
    import hashlib

    from safetensors.torch import save

    return hashlib.sha256(save(dict(plugins.state_dict()))).hexdigest()


def _require_one_pad(output: str | Path, ratios: Sequence[int], pad: str) -> None:
    """Plugins of one folder treat padding alike; refuse a mixture before the fit, not after it."""
    from exporter.checkpoint import find_checkpoint

    found = find_checkpoint(output)
    kept = [ratio for ratio in found.ratios if ratio not in ratios] if found is not None else []
    if found is not None and kept and found.pad != pad:
        hint = "use another folder, or fit all of them again"
        raise InputError(describe(f"{output}: ratios {kept} have pad {found.pad}", got=f"pad {pad}", hint=hint))
