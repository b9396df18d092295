"""What one does with compexport, but for training: build, import, load, bench, evaluate, select, run, inspect, verify.

Each is a short composition of the folders below; the command line calls the same functions. Those whose result a
command prints return that command's JSON document as a dict.
"""

from __future__ import annotations

from compexport.api.answering import exit_rule, paired, run, select
from compexport.api.building import (
    DEFAULT_RATIOS,
    IMPORTED_METHODS,
    PRECISIONS,
    build,
    build_document,
    build_method,
    build_recipes,
    import_checkpoint,
)
from compexport.api.bundles import export, inspect, load, open_bundle, verify
from compexport.api.checks import checked_ratios, choice, whole_ratios
from compexport.api.measuring import bench, evaluate, evaluate_examples
from compexport.api.options import (
    ASSEMBLIES,
    COLUMNS,
    DEVICE,
    EXITS,
    FIT,
    MODULES,
    ROWS,
    SAVING,
    SHARED,
    SLENDER,
    STEPS,
    WRITING,
    Assemblies,
    Columns,
    Device,
    Exits,
    Fit,
    Modules,
    Rows,
    Saving,
    Shared,
    Slender,
    WritingCheck,
)
from compexport.api.reading import read_examples
from compexport.present import quiet
from compexport.stepping import Steps

__all__ = [
    # a family
    "import_checkpoint",
    "build",
    "build_document",
    "build_method",
    "build_recipes",
    "IMPORTED_METHODS",
    "PRECISIONS",
    "DEFAULT_RATIOS",
    # a bundle as it lies there
    "open_bundle",
    "load",
    "inspect",
    "verify",
    "export",
    # what it is measured to do
    "bench",
    "evaluate",
    "evaluate_examples",
    "read_examples",
    # answers
    "select",
    "run",
    "exit_rule",
    "paired",
    # how it is done, and the defaults
    "Columns",
    "Fit",
    "Slender",
    "Shared",
    "Modules",
    "Assemblies",
    "Rows",
    "Saving",
    "Device",
    "Exits",
    "Steps",
    "WritingCheck",
    "COLUMNS",
    "FIT",
    "SLENDER",
    "SHARED",
    "MODULES",
    "ASSEMBLIES",
    "ROWS",
    "SAVING",
    "DEVICE",
    "EXITS",
    "STEPS",
    "WRITING",
    "quiet",
    # checks of what was asked
    "choice",
    "checked_ratios",
    "whole_ratios",
]
