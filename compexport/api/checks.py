"""Checks of what was asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from compexport.errors import InputError, describe

Name = TypeVar("Name", bound=str)


def whole_ratios(ratios: Sequence[float]) -> list[int]:
    """Ratios of a method that groups whole tokens, checked; 1, the backbone, is always built and may be left out."""
    for ratio in ratios:
        if not math.isfinite(ratio) or ratio != int(ratio):
            raise InputError(describe("--ratio must be whole for variator", got=f"{ratio:g}", expected="like 2,4,8"))
    return [int(ratio) for ratio in checked_ratios(ratios) if ratio != 1]


def checked_ratios(ratios: Sequence[float]) -> list[float]:
    """Ratios, checked; whole ones as int."""
    from exporter.checkpoint import plain_ratio

    checked: list[float] = []
    for ratio in ratios:
        if not (math.isfinite(ratio) and ratio >= 1):
            raise InputError(describe("--ratio is too small", got=f"{ratio:g}", expected="1 or more, like 2,4,8"))
        if ratio in checked:
            raise InputError(describe("--ratio is there twice", got=f"{ratio:g}", expected="each ratio once"))
        checked.append(plain_ratio(ratio))
    return checked


def choice(what: str, got: str, choices: Sequence[Name]) -> Name:
    for one in choices:
        if one == got:
            return one
    raise InputError(describe(f"unknown {what}", got=got, expected=" or ".join(choices)))
