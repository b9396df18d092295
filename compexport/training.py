"""``compexport train``: fitting plugins to a model, or fine-tuning the model itself.

Each function is a short composition of ``calib``; what they return is the command's JSON document as a dict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compexport.api import (
    COLUMNS,
    DEFAULT_RATIOS,
    FIT,
    METHODS,
    ROWS,
    SAVING,
    Columns,
    Fit,
    Rows,
    Saving,
    choice,
    quiet,
    read_examples,
    whole_ratios,
)
from compexport.errors import InputError, describe
from compexport.present import Progress

if TYPE_CHECKING:
    from calib.data import Examples
    from calib.settings import FitSettings
    from calib.unfinished import Unfinished
    from exporter.backbone import Backbone
    from exporter.methods.variator import Plugins

TRAININGS = (*METHODS, "finetune")
LOSSES: tuple[Literal["hidden", "task", "task-hidden"], ...] = ("hidden", "task", "task-hidden")
UNTIL_TIME_IS_UP = 1_000_000  # steps, for a fit that only a number of seconds ends


def train(
    model: str | Path,
    data: str | Path,
    *,
    ratios: Sequence[float] | None = None,
    output: str | Path = "trained",
    method: str = "variator",
    columns: Columns = COLUMNS,
    rows: Rows = ROWS,
    fit: Fit = FIT,
    saving: Saving = SAVING,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Fit plugins to ``model`` (method "variator") or fine-tune it ("finetune"), and write ``output``.

    Under torchrun or accelerate, all processes call it alike. An interrupted run leaves ``OUT.unfinished`` beside
    ``output``, from which ``saving.resume`` goes on. Raises InputError for bad input, and then nothing was written.
    """
    if choice("method", method, TRAININGS) == "finetune":
        if ratios is not None:
            raise InputError(describe("--ratio", got="finetune", expected="the method variator"))
        return finetune(
            model, data, output=output, columns=columns, rows=rows, fit=fit, saving=saving, progress=progress
        )
    wanted = whole_ratios(ratios if ratios is not None else DEFAULT_RATIOS)
    if not wanted:
        raise InputError(describe("nothing to fit: ratio 1 is the backbone", expected="ratios above 1, like 2,4,8"))
    _require_checkpoint_place(Path(output), Path(model))
    from calib import processes

    with processes.joined():
        _require_resumable(output, saving, progress)
        texts = _training_rows(data, columns, rows, fit, progress)
        return fit_texts(model, texts, ratios=wanted, output=output, fit=fit, saving=saving, progress=progress)


def finetune(
    model: str | Path,
    data: str | Path,
    *,
    output: str | Path,
    columns: Columns = COLUMNS,
    rows: Rows = ROWS,
    fit: Fit = FIT,
    saving: Saving = SAVING,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Fine-tune ``model`` on the labels of ``data`` and write a Hugging Face folder; errors as ``train``.

    Where ``data`` is a folder with dev.*, the accuracy there is measured.
    """
    from calib import data as reading
    from calib import finetune as tuning
    from calib import learners, processes, unfinished

    if fit.separately or fit.fresh or fit.start is not None or fit.span is not None or fit.loss != "hidden":
        wrong = "--loss, --separately, --fresh, --start, --span"
        raise InputError(describe("fine-tuning has no plugins", got=f"one of {wrong}", expected="the method variator"))
    tuning.require_place(Path(output), Path(model))
    chosen: dict[str, Any] = {"epochs": fit.epochs} if fit.epochs is not None else {}
    settings = tuning.FinetuneSettings(steps=_steps(fit), **chosen, **_given(fit)).checked()
    with processes.joined():
        _require_resumable(output, saving, progress)
        training = _training_rows(data, columns, rows, fit, progress)
        dev = read_examples(data, "dev", columns, progress) if reading.has_split(data, "dev") else None
        progress("loading the model")
        learner = learners.open_learner(model, training, fit.seed)
        run = tuning.run_description(settings, learner, training, dev)
        with unfinished.keeping(Path(output), run, resume=saving.resume, save_every=saving.save_every) as state:
            result = tuning.finetune(learner, training, dev, settings=settings, unfinished=state, progress=progress)
            processes.by_first(lambda: result.save(output))
    return {"output": str(output), **result.record}


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

    settings = FitSettings(loss=choice("loss", fit.loss, LOSSES), pad=pad, span=fit.span, **_given(fit)).checked()
    steps = _steps(fit)
    if fit.epochs is not None:
        trained = rows - len(held_out_rows(rows))
        steps = math.ceil(fit.epochs * math.ceil(trained / settings.batch_size))
    elif steps is None and fit.max_seconds is not None:
        steps = UNTIL_TIME_IS_UP
    return settings if steps is None else replace(settings, steps=steps)


def _given(fit: Fit) -> dict[str, Any]:
    """Settings that have another value than the method's default, by the names that all methods have for them."""
    names = ("max_seconds", "batch_size", "learning_rate", "max_length")
    values = {name: getattr(fit, name) for name in names if getattr(fit, name) is not None}
    return {**values, "seed": fit.seed, "precision": fit.precision}


def _steps(fit: Fit) -> int | None:
    if fit.steps is not None and fit.epochs is not None:
        raise InputError(describe("both --steps and --epochs were given", expected="one of them"))
    if fit.epochs is not None and not (fit.epochs > 0 and math.isfinite(fit.epochs)):
        raise InputError(describe("--epochs", got=fit.epochs, expected="more than 0"))
    return fit.steps


def _starting_plugins(
    backbone: Backbone, ratios: Sequence[int], fit: Fit
) -> tuple[dict[int, Plugins], Literal["masked", "official"]]:
    """Plugins by ratio from which a fit goes on, and how they treat padding: the model's own, or another folder's."""
    from exporter.checkpoint import find_checkpoint
    from exporter.methods.variator import plugins_from_tensors

    if fit.fresh and fit.start is not None:
        raise InputError(describe("both --fresh and --start were given", expected="one of them"))
    checkpoint = find_checkpoint(fit.start if fit.start is not None else backbone.folder)
    if checkpoint is None:
        if fit.start is not None:
            raise InputError(describe(f"{fit.start}: no plugins", expected="a folder made by `compexport train`"))
        return {}, "masked"
    pad: Literal["masked", "official"] = "official" if checkpoint.pad == "official" else "masked"
    if fit.fresh:
        return {}, pad
    missing = [ratio for ratio in ratios if ratio not in checkpoint.files]
    if missing and fit.start is not None:
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


# --- checks of what was asked ---


def _training_rows(data: str | Path, columns: Columns, rows: Rows, fit: Fit, progress: Progress) -> Examples:
    """The training rows that are wanted."""
    examples = read_examples(data, "train", columns, progress, rows.limit if rows.first else None)
    if rows.limit is not None and rows.limit < len(examples):
        progress(f"{rows.limit} of them, drawn by seed {fit.seed}")
    return examples.sample(rows.limit, fit.seed)


def _require_resumable(output: str | Path, saving: Saving, progress: Progress) -> None:
    """Refuse to lose an unfinished run before a large file is read."""
    from calib import processes, unfinished

    if not saving.resume:
        processes.by_first(lambda: unfinished.require_none(Path(output)))
    elif not unfinished.place(Path(output)).exists():
        progress("no unfinished run: starting from the beginning")


def _require_checkpoint_place(output: Path, model: Path) -> None:
    """Refuse an output that is something else before minutes are spent on it."""
    from exporter.checkpoint import find_checkpoint
    from exporter.identity import backbone_sha256

    if not output.exists() or output.resolve() == model.resolve():
        return
    found = find_checkpoint(output) if output.is_dir() and any(output.iterdir()) else None
    empty = output.is_dir() and not any(output.iterdir())
    if not empty and (found is None or found.backbone_sha256 != backbone_sha256(model)):
        raise InputError(describe(f"{output}: already there", expected="a new folder, or a checkpoint of this model"))


def _require_one_pad(output: str | Path, ratios: Sequence[int], pad: str) -> None:
    """Plugins of one folder treat padding alike; refuse a mixture before the fit, not after it."""
    from exporter.checkpoint import find_checkpoint

    found = find_checkpoint(output)
    kept = [ratio for ratio in found.ratios if ratio not in ratios] if found is not None else []
    if found is not None and kept and found.pad != pad:
        hint = "use another folder, or fit all of them again"
        raise InputError(describe(f"{output}: ratios {kept} have pad {found.pad}", got=f"pad {pad}", hint=hint))
