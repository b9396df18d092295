"""A user's labels, given as names or numbers, as the model's class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compexport.errors import InputError, describe

if TYPE_CHECKING:
    from calib.data import Examples

# Tasks whose answer is one class of a text. "label-words": the class is the most likely of some words.
CLASSIFIERS = ("sequence-classification", "label-words")
MOST_CLASSES = 1000  # more distinct labels than this are something else than classes
SHOWN = 5  # labels in a message


def label_ids(
    labels: Sequence[Any], names: Sequence[str], origin: str = "", label_names: Sequence[str] | None = None
) -> list[int]:
    """Positions in ``names``, a model's labels, of labels given as names (without regard to case) or numbers.

    ``label_names`` are what the numbers of the data mean, where the data say so: then names decide, and numbers only
    for a model of as many labels that have no names of their own ("LABEL_0", "0"). Otherwise number n is the model's
    label n, unless the model's names are whole numbers themselves. InputError names the stranger.
    """
    if label_names is None:
        return _positions(labels, names, origin)
    numbers = _positions(labels, label_names, origin)
    if _unnamed(names, label_names):
        return _positions(numbers, names, origin)
    hint = "the data's labels.txt says what their numbers mean"
    return _positions([label_names[number] for number in numbers], names, origin, hint)


def are_numbers(names: Sequence[str]) -> bool:
    """Whether every name is a whole number."""
    return all(name.strip().removeprefix("-").isdecimal() for name in names)


def _positions(labels: Sequence[Any], names: Sequence[str], origin: str, hint: str = "") -> list[int]:
    """Number n is the name at n, but "1" among names like "1", "2", "3" is a name."""
    by_name = {} if are_numbers(names) else {str(index): index for index in range(len(names))}
    by_name |= {name.strip().lower(): index for index, name in enumerate(names)}
    found = []
    for row, label in enumerate(labels, start=1):
        key = _text(label).lower()
        if key not in by_name:
            where = f"{origin}: row {row}: " if origin else ""
            expected = f"one of {', '.join(names)}"
            if not hint and not are_numbers(names):
                expected += f" or 0 to {len(names) - 1}"
            raise InputError(describe(f"{where}unknown label", got=repr(label), expected=expected, hint=hint))
        found.append(by_name[key])
    return found


def _unnamed(names: Sequence[str], label_names: Sequence[str]) -> bool:
    """Whether a model's labels are numbers that say nothing, as many as the data have names, and none of these."""
    bare = [name.strip().lower() for name in names]
    default = bare == [f"label_{index}" for index in range(len(bare))]
    known = set(bare) & {name.lower() for name in label_names}
    return (default or are_numbers(names)) and len(names) == len(label_names) and not known


def class_names(examples: Examples) -> list[str]:
    """The names of the classes that the labels of ``examples`` tell apart, in the order of their numbers.

    Whole numbers are ordered as such, names by the alphabet. Where the data name their numbers (``label_names``), these
    are the names. InputError for labels that are no classes: none, lists, fractions, all alike, or nearly all distinct.
    """
    origin = examples.origin or "data"
    if examples.labels is None:
        hint = "name the column with --label"
        raise InputError(describe(f"{origin}: no label column recognised", expected="labels", hint=hint))
    if examples.label_names is not None:
        label_ids(examples.labels, examples.label_names, origin)
        return examples.label_names
    spelled: dict[str, str] = {}
    for row, label in enumerate(examples.labels, start=1):
        if isinstance(label, list | tuple | dict) or (isinstance(label, float) and not label.is_integer()):
            got, hint = repr(label), "name another column with --label"
            raise InputError(describe(f"{origin}: row {row}: label", got=got, expected="one class", hint=hint))
        spelled.setdefault(_text(label).lower(), _text(label))
    names = list(spelled.values())
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    if len(names) < 2:
        raise InputError(describe(f"{origin}: labels", got=f"only {shown}", expected="at least two classes"))
    if len(names) > min(MOST_CLASSES, max(2, len(examples) // 2)):
        got, hint = f"{len(names)} distinct ones ({shown}) in {len(examples)} rows", "name another column with --label"
        raise InputError(describe(f"{origin}: labels", got=got, expected="few classes", hint=hint))
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names, key=str.lower)


def _text(label: Any) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip()
