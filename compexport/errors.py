"""Errors that a user can act on; each knows the exit code of the command line.

A message is one line: what is wrong, what was got, what was expected, what to do.
"""

from __future__ import annotations


class CompexportError(Exception):
    """Something failed that is not the caller's input. Exit code 1."""

    exit_code = 1


class InputError(CompexportError):
    """Wrong usage or bad input. Exit code 2; nothing has been written."""

    exit_code = 2


class BundleError(InputError):
    """A bundle that is damaged, unsafe, or of another format version."""


class DependencyError(InputError):
    """A library that is missing, or two that exclude each other."""


class ParityError(CompexportError):
    """A graph whose outputs differ from PyTorch's by more than the tolerance."""


class TargetMissed(CompexportError):
    """The work is done but what was asked of it was not reached. Exit code 3."""

    exit_code = 3


def describe(what: str, *, got: object = None, expected: object = None, hint: str = "") -> str:
    """Compose the one-line message: ``what: got X, expected Y; hint``."""
    facts = []
    if got is not None:
        facts.append(f"got {got}")
    if expected is not None:
        facts.append(f"expected {expected}")
    line = f"{what}: {', '.join(facts)}" if facts else what
    return f"{line}; {hint}" if hint else line
