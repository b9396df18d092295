"""Making a family: import an official checkpoint, build a bundle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compexport.api.bundles import open_bundle
from compexport.api.checks import checked_ratios, choice, whole_ratios
from compexport.api.options import ASSEMBLIES, COLUMNS, FIT, STEPS, Assemblies, Columns, Fit
from compexport.api.reading import read_examples
from compexport.errors import InputError, describe
from compexport.present import Progress, quiet
from compexport.stepping import Steps
from engines.backends.trt_options import PLAN_OPTIONS, PlanOptions

if TYPE_CHECKING:
    from calib.data import Examples
    from engines.bundle import Bundle
    from exporter.checkpoint import MethodCheckpoint

IMPORTED_METHODS = ("variator", "costeff", "theseus")
PRECISIONS: tuple[Literal["fp32", "fp16", "bf16"], ...] = ("fp32", "fp16", "bf16")
DEFAULT_RATIOS = (2, 4, 8)


def import_checkpoint(
    file: str | Path,
    *,
    backbone: str | Path | None = None,
    output: str | Path = "imported",
    method: str = "variator",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Turn an official file or folder of ``method`` into the checkpoint ``output``.

    ``backbone`` is the model folder that it was made for; costeff needs none, and theseus, of which a plain model is
    made, takes none. Raises InputError for anything that does not fit exactly, in which case nothing was written.
    """
    if choice("method", method, IMPORTED_METHODS) == "theseus":
        if backbone is not None:
            hint = "the folder holds all of its model"
            raise InputError(describe("--backbone", got=backbone, expected="none for theseus", hint=hint))
        progress(f"importing {file}")
        from exporter.importers.theseus import import_theseus

        return import_theseus(file, output).document()
    if method == "costeff":
        progress(f"importing {file}")
        from exporter.importers.costeff import import_costeff

        return import_costeff(file, backbone, output).document()
    if backbone is None:
        hint = "--backbone names the T5 folder that FILE was made for"
        raise InputError(describe("variator plugins need a backbone", expected="--backbone MODEL", hint=hint))
    progress(f"importing {file}")
    from exporter.importers.variator import import_variator

    return import_variator(file, backbone, output).document()


def build(
    model: str | Path = ".", ratios: Sequence[float] | None = None, output: str | Path = "bundle", **options: Any
) -> Bundle:
    """Build every ratio of ``model`` into the bundle ``output`` and open it; options as of ``build_document``."""
    build_document(model, ratios=ratios, output=output, **options)
    return open_bundle(output)


def build_document(
    model: str | Path = ".",
    *,
    ratios: Sequence[float] | None = None,
    output: str | Path = "bundle",
    backend: str = "ort",
    precision: str = "fp32",
    method: str | None = None,
    exits: Sequence[float] | str | None = None,
    prefix: bool = False,
    steps: Steps = STEPS,
    plans: PlanOptions = PLAN_OPTIONS,
    assemblies: Assemblies = ASSEMBLIES,
    data: str | Path | None = None,
    columns: Columns = COLUMNS,
    fit: Fit = FIT,
    untrained: bool = False,
    command: str = "compexport.build",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Trace, check and build; with ``data``, plugins that ``model`` lacks are fitted first and kept in its folder.

    ``ratios`` defaults to those ``model`` was trained for, or 2, 4, 8; of methods "ode" and "modular" to those of 2, 3,
    4 and of 1.5, 2, 3, 6 that its layers allow. ``exits``: layers (method "costeff") or steps ("ode") counted from 1 at
    which segments end; costeff also "auto", which ``data`` alone means too. ``prefix`` adds a graph from the ids to
    each of them. ``steps``: method "ode" alone, whose steps are chosen on ``data``. ``assemblies``: "modular" alone.
    ``plans``: backends "trt" and "trt-rtx" alone; where "trt" cannot build here it writes recipes, for
    ``build_recipes``. Raises InputError for bad input, in which case nothing was written, and ParityError when a graph
    differs from PyTorch, in which case no bundle was.
    """
    from compexport import assembling, stepping, training
    from engines import backends
    from exporter import family
    from exporter.checkpoint import find_checkpoint
    from exporter.plans import PLANS, plan_of

    if method is not None:
        choice("method", method, tuple(PLANS))
    arithmetic = choice("precision", precision, PRECISIONS)
    checkpoint = find_checkpoint(model, method)
    planned = plan_of(Path(model), method, checkpoint)
    there = checkpoint.ratios if checkpoint is not None else []
    if ratios is None and planned.method == "ode":
        wanted = stepping.usual_ratios(model, checkpoint, steps.sizes)
    elif ratios is None and planned.method == "modular":
        wanted = assembling.usual_ratios(model, checkpoint)
    elif ratios is None:
        wanted = there or list(DEFAULT_RATIOS)
    else:
        wanted = [*whole_ratios(ratios)] if planned.whole_ratios else checked_ratios(ratios)
    _require_free(output)
    backends.builder(backend, plans, arithmetic)
    _require_meaning(planned.method, exits, prefix, steps, assemblies)
    read = None if data is None else partial(_calibration, data, columns, progress)
    options: dict[str, Any] = {}
    if planned.method == "costeff":
        found = _exits(model, checkpoint, wanted, exits, None if untrained else read, progress)
        options = {"exits": found, "prefixes": prefix}
    elif planned.method == "ode":
        chosen = stepping.plan_options(model, checkpoint, wanted, steps, read, progress)
        options = {**chosen, "exits": _exit_steps(exits), "prefixes": prefix}
    elif planned.method == "modular":
        options = assembling.plan_options(model, checkpoint, wanted, assemblies, read, output, progress)
    elif data is not None and not untrained and (missing := [ratio for ratio in wanted if ratio not in there]):
        texts = read_examples(data, "train", columns, progress)
        if fit.span is None:
            fit = replace(fit, span=training.span_of(checkpoint))
        training.fit_texts(model, texts, ratios=whole_ratios(missing), output=model, fit=fit, progress=progress)
    report = family.build(
        model,
        wanted,
        output,
        method=planned.method,
        backend=backend,
        plans=plans,
        precision=arithmetic,
        untrained=untrained,
        seed=fit.seed,
        command=command,
        progress=progress,
        **options,
    )
    return report.document()


def build_recipes(bundle: str | Path = "bundle", *, progress: Progress = quiet) -> dict[str, Any]:
    """Build the TensorRT plans that ``bundle`` has recipes of, here, and add them to it; needs no torch.

    Raises BundleError without recipes, DependencyError where the library or the device is missing here too.
    """
    from engines.backends import trt
    from engines.manifest import engine_rows

    manifest = trt.finish_recipes(bundle, progress).manifest
    return {"bundle": str(Path(bundle).resolve()), "engines": engine_rows(manifest)}


def build_method(model: str | Path, method: str | None = None) -> str:
    """Which method ``build`` would take: the one that is named, or that of the checkpoint in ``model``."""
    from exporter.checkpoint import find_checkpoint
    from exporter.plans import plan_of

    return plan_of(Path(model), method, find_checkpoint(model, method)).method


def _exits(
    model: str | Path,
    checkpoint: MethodCheckpoint | None,
    ratios: Sequence[float],
    wanted: Sequence[float] | str | None,
    read: Callable[[], Examples] | None,
    progress: Progress,
) -> dict[float, tuple[int, ...]]:
    """Exits by ratio; none where the default is meant. ``read`` gives rows to choose them on."""
    from compexport.exits import AUTO, chosen_exits, given_exits
    from exporter.plans import PLANS

    if isinstance(wanted, str):
        if wanted != AUTO:
            raise InputError(describe("--exits", got=repr(wanted), expected="layers like 2,4,6, or auto"))
    elif wanted is not None:
        return given_exits(model, wanted, ratios)
    if read is None:
        if wanted is None:
            return {}
        raise InputError(describe("--exits auto chooses on texts", expected="--data FILE, and a trained model"))
    PLANS["costeff"](Path(model), tuple(sorted({1, *ratios})), checkpoint).require_trained()
    return chosen_exits(model, checkpoint, ratios, read(), progress)


def _calibration(data: str | Path, columns: Columns, progress: Progress) -> Examples:
    """Rows to choose on: not those that ``evaluate`` reports on, where there are others."""
    from calib import data as reading

    only_dev = reading.has_split(data, "dev") and not reading.has_split(data, "train")
    return read_examples(data, "dev" if only_dev else "train", columns, progress)


def _exit_steps(wanted: Sequence[float] | str | None) -> tuple[int, ...] | None:
    """``--exits`` of method ode: steps counted from 1, rising; those beyond a ratio's last are left out later."""
    if wanted is None:
        return None
    if isinstance(wanted, str):
        raise InputError(describe("--exits of the method ode", got=repr(wanted), expected="steps like 1,2,4"))
    steps = [int(step) for step in wanted if math.isfinite(step) and step == int(step) and step >= 1]
    if steps != list(wanted) or steps != sorted(set(steps)) or not steps:
        got = ",".join(f"{step:g}" for step in wanted)
        raise InputError(describe("--exits of the method ode are steps", got=got, expected="rising, like 1,2,4"))
    return tuple(steps)


def _require_meaning(method: str, exits: object, prefix: bool, steps: Steps, assemblies: Assemblies) -> None:
    """InputError for an option that means nothing to the method."""
    ode, both, modular = ("ode",), ("costeff", "ode"), ("modular",)
    asked = {
        "exits": (exits is not None, both),
        "prefix": (prefix, both),
        "form": (steps.form is not None, ode),
        "steps": (steps.sizes is not None, ode),
        "step-engine": (steps.engine, ode),
        "strategy": (assemblies.strategy is not None, modular),
        "assemblies": (assemblies.more is not None, modular),
        "pairs": (assemblies.pairs, modular),
    }
    for name, (given, methods) in asked.items():
        if given and method not in methods:
            raise InputError(describe(f"--{name}", got=f"the method {method}", expected=" or ".join(methods)))


def _require_free(output: str | Path) -> None:
    """Refuse an output that is no bundle before minutes are spent on it; nothing is written."""
    from engines.bundle import BundleWriter

    BundleWriter(output)
