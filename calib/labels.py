"""A user's labels, given as names or numbers, as the model's class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compexport.errors import InputError, describe

# Tasks whose answer is one class of a text. "label-words": the class is the most likely of some words.
CLASSIFIERS = ("sequence-classification", "label-words")


def label_ids(labels: Sequence[Any], names: Sequence[str], origin: str = "") -> list[int]:
    """Class numbers of labels given as names (without regard to case) or numbers. InputError names the stranger."""
    by_name = {str(index): index for index in range(len(names))} | {name.lower(): i for i, name in enumerate(names)}
    found = []
    for row, label in enumerate(labels, start=1):
        key = str(int(label)) if isinstance(label, float) and label == int(label) else str(label).strip().lower()
        if key not in by_name:
            where = f"{origin}: row {row}: " if origin else ""
            expected = f"one of {', '.join(names)} or 0 to {len(names) - 1}"
            raise InputError(describe(f"{where}unknown label", got=repr(label), expected=expected))
        found.append(by_name[key])
    return found
