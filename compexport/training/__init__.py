"""``compexport train``: one file for each kind of training, each a short composition of ``calib``.

What they return is the command's JSON document as a dict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compexport.api import (
    COLUMNS,
    FIT,
    MODULES,
    ROWS,
    SAVING,
    SHARED,
    SLENDER,
    Columns,
    Fit,
    Modules,
    Rows,
    Saving,
    Shared,
    Slender,
    choice,
    quiet,
)
from compexport.present import Progress
from compexport.training import costeff, finetune, modular, ode, variator
from compexport.training.job import Job, foreign_options
from compexport.training.variator import fit_texts, span_of

__all__ = ["TRAININGS", "fit_texts", "foreign_options", "span_of", "train"]

TRAININGS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "variator": variator.train,
    "costeff": costeff.train,
    "ode": ode.train,
    "modular": modular.train,
    "finetune": finetune.train,
}


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
    slender: Slender = SLENDER,
    shared: Shared = SHARED,
    modules: Modules = MODULES,
    saving: Saving = SAVING,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Fit plugins to ``model`` (method "variator"), make it slender ("costeff"), train modules
    for spans of its layers ("modular"), or fine-tune it ("finetune").

    Method "ode" trains a model that shares layers to be run in fewer, larger steps.

    Under torchrun or accelerate, all processes call it alike. An interrupted run leaves ``OUT.unfinished`` beside
    ``output``, from which ``saving.resume`` goes on. Raises InputError for bad input, and then nothing was written.
    """
    chosen = TRAININGS[choice("method", method, tuple(TRAININGS))]
    folders = Path(model), Path(data), Path(output)
    job = Job(method, *folders, ratios, columns, rows, fit, slender, shared, modules, saving, progress)
    job.require_own_options()
    return chosen(job)
