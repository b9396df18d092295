"""compexport: one trained Transformer in, a family of engines out, and a runtime that keeps a latency budget.

    bundle  = compexport.build("model/", ratios=[2, 4, 8], output="bundle/")
    runtime = compexport.load("bundle/")
    result  = runtime("a fine film", budget_ms=5)

Importing this costs nothing: every name below is resolved when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compexport.api import (
        Columns,
        Device,
        Exits,
        Fit,
        Rows,
        Saving,
        Slender,
        WritingCheck,
        bench,
        build,
        evaluate,
        import_checkpoint,
        inspect,
        load,
        verify,
    )
    from compexport.errors import (
        BundleError,
        CompexportError,
        DependencyError,
        InputError,
        ParityError,
        TargetMissed,
    )
    from compexport.training import train
    from engines.backends.trt_options import PlanOptions, Range
    from engines.bundle import Bundle
    from engines.exit_rule import ExitRule
    from engines.results import Result
    from engines.runtime import Runtime
    from engines.sampling import Sampling
    from engines.selector import Decision

__version__ = "0.1.0"

__all__ = [
    # what one does
    "bench",
    "build",
    "evaluate",
    "import_checkpoint",
    "inspect",
    "load",
    "train",
    "verify",
    # what one gets
    "Bundle",
    "Decision",
    "Result",
    "Runtime",
    # how it is done
    "Columns",
    "Device",
    "ExitRule",
    "Exits",
    "Fit",
    "PlanOptions",
    "Range",
    "Rows",
    "Sampling",
    "Saving",
    "Slender",
    "WritingCheck",
    # what can go wrong
    "BundleError",
    "CompexportError",
    "DependencyError",
    "InputError",
    "ParityError",
    "TargetMissed",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(("bench", "build", "evaluate", "import_checkpoint"), "compexport.api"),
    **dict.fromkeys(("inspect", "load", "verify"), "compexport.api"),
    **dict.fromkeys(("Columns", "Device", "Exits", "Fit", "Rows", "Saving", "Slender"), "compexport.api"),
    "WritingCheck": "compexport.api",
    "train": "compexport.training",
    "Bundle": "engines.bundle",
    "Decision": "engines.selector",
    "ExitRule": "engines.exit_rule",
    "PlanOptions": "engines.backends.trt_options",
    "Range": "engines.backends.trt_options",
    "Result": "engines.results",
    "Runtime": "engines.runtime",
    "Sampling": "engines.sampling",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'compexport' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "compexport.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _refuse_shadowed_packages() -> None:
    """The project's folders have plain names; a package of the same name found earlier would be used in their place."""
    root = Path(__file__).resolve().parent.parent
    for name in ("exporter", "engines", "calib"):
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"compexport needs its package {name!r} at {root / name}; install compexport again")
        found = Path(next(iter(spec.submodule_search_locations)))
        if found != root / name and found.resolve() != root / name:
            raise ImportError(
                f"another package named {name!r} at {found} hides compexport's own at {root / name}; "
                f"uninstall it, or run compexport in its own virtual environment"
            )


_refuse_shadowed_packages()
