"""What a training run is asked to do, and the checks that all kinds have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compexport.api import (
    FIT,
    MODULES,
    SHARED,
    SLENDER,
    Columns,
    Fit,
    Modules,
    Rows,
    Saving,
    Shared,
    Slender,
    read_examples,
)
from compexport.errors import InputError, describe
from compexport.present import Progress

if TYPE_CHECKING:
    from calib.data import Examples

# Which kinds of training an option is for; all others are for all.
OPTIONS_OF = {
    "ratio": ("variator", "costeff", "ode", "modular"),
    **dict.fromkeys(("loss", "separately", "span", "fresh", "start"), ("variator",)),
    **dict.fromkeys((field.name for field in fields(Slender)), ("costeff",)),
    **dict.fromkeys((field.name for field in fields(Shared)), ("ode",)),
    **dict.fromkeys((field.name for field in fields(Modules)), ("modular",)),
}


def foreign_options(method: str) -> set[str]:
    """The options that are for other kinds of training."""
    return {name for name, methods in OPTIONS_OF.items() if method not in methods}


@dataclass(frozen=True)
class Job:
    """One training run: what is trained on what, where the result goes, and how."""

    method: str
    model: Path
    data: Path
    output: Path
    ratios: Sequence[float] | None
    columns: Columns
    rows: Rows
    fit: Fit
    slender: Slender
    shared: Shared
    modules: Modules
    saving: Saving
    progress: Progress

    def require_own_options(self) -> None:
        """InputError for an option that means nothing to this kind of training."""
        given = {"ratio"} if self.ratios is not None else set()
        pairs = ((self.fit, FIT), (self.slender, SLENDER), (self.shared, SHARED), (self.modules, MODULES))
        for asked, default in pairs:
            given |= {one.name for one in fields(asked) if getattr(asked, one.name) != getattr(default, one.name)}
        for name in sorted(given & foreign_options(self.method)):
            expected = "the method " + " or ".join(OPTIONS_OF[name])
            raise InputError(describe(f"--{name.replace('_', '-')}", got=self.method, expected=expected))

    def require_resumable(self) -> None:
        """Refuse to lose an unfinished run before a large file is read."""
        from calib import processes, unfinished

        if not self.saving.resume:
            processes.by_first(lambda: unfinished.require_none(self.output))
        elif not unfinished.place(self.output).exists():
            self.progress("no unfinished run: starting from the beginning")

    def require_checkpoint_place(self) -> None:
        """Refuse an output that is something else before minutes are spent on it."""
        from exporter.checkpoint import find_checkpoint
        from exporter.identity import backbone_sha256

        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return
        found = find_checkpoint(self.output, self.method) if self.output.is_dir() else None
        if self.output.resolve() == self.model.resolve() or self.lacks_tidying_only():
            return
        if found is None or found.backbone_sha256 != backbone_sha256(self.model):
            expected = "a new folder, or a checkpoint of this model"
            raise InputError(describe(f"{self.output}: already there", expected=expected))

    def require_new_place(self, why: str) -> None:
        """InputError for an output that is there: no older checkpoint can be of the model that is to be made."""
        free = not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir()))
        if not free and not self.lacks_tidying_only():
            raise InputError(describe(f"{self.output}: already there", expected=f"a new folder, as {why}"))

    def lacks_tidying_only(self) -> bool:
        """Whether the run to go on with has written the output already, with the backbone that it fine-tuned."""
        from calib import unfinished
        from exporter.checkpoint import find_checkpoint
        from exporter.identity import backbone_sha256

        made = unfinished.place(self.output) / unfinished.BACKBONE
        if not (self.saving.resume and made.is_dir() and self.output.is_dir()):
            return False
        found = find_checkpoint(self.output, self.method)
        return found is not None and found.backbone_sha256 == backbone_sha256(made)

    def training_rows(self) -> Examples:
        """The training rows that are wanted."""
        limit = self.rows.limit
        examples = read_examples(self.data, "train", self.columns, self.progress, limit if self.rows.first else None)
        if limit is not None and limit < len(examples):
            self.progress(f"{limit} of them, drawn by seed {self.fit.seed}")
        return examples.sample(limit, self.fit.seed)

    def dev_rows(self) -> Examples | None:
        """Where the data are a folder with dev.*, these."""
        from calib import data as reading

        if not reading.has_split(self.data, "dev"):
            return None
        return read_examples(self.data, "dev", self.columns, self.progress)


def given(fit: Fit) -> dict[str, Any]:
    """Settings that have another value than the method's default, by the names that all methods have for them."""
    names = ("max_seconds", "batch_size", "learning_rate", "max_length")
    values = {name: getattr(fit, name) for name in names if getattr(fit, name) is not None}
    return {**values, "seed": fit.seed, "precision": fit.precision}


def length(fit: Fit) -> dict[str, Any]:
    """The number of steps or epochs that was asked for, none or one of them."""
    if fit.steps is not None and fit.epochs is not None:
        raise InputError(describe("both --steps and --epochs were given", expected="one of them"))
    if fit.epochs is not None and not (fit.epochs > 0 and math.isfinite(fit.epochs)):
        raise InputError(describe("--epochs", got=fit.epochs, expected="more than 0"))
    return {name: getattr(fit, name) for name in ("steps", "epochs") if getattr(fit, name) is not None}
