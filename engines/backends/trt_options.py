"""What a user says about TensorRT plans: for which shapes, for which cards, and how they are compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from compexport.errors import InputError, describe


@dataclass(frozen=True)
class Range:
    """Sizes that an axis may have, and the one to be fastest at."""

    low: int
    usual: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}:{self.usual}:{self.high}"


@dataclass(frozen=True)
class PlanOptions:
    """Options of `compexport build --backend trt|trt-rtx`; None keeps what is said beside it.

    ``batch`` 1:8:32, ``length`` 1:128:512 or what the model can, ``targets`` the cards' compute capabilities
    (TensorRT-RTX alone: sm86, sm89 and sm120), ``workspace_mib`` and ``level`` (0-5) the library's own.
    ``strip``: plans without weights, which are refitted from the bundle's graphs where they are opened.
    ``detailed``: plans that can tell about their layers. ``plugins``: the merge operators as one kernel each (TensorRT
    alone). ``recipe``: build nothing, write how to.
    """

    batch: Range | None = None
    length: Range | None = None
    targets: tuple[str, ...] | None = None
    workspace_mib: int | None = None
    level: int | None = None
    strip: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    detailed: bool = False
    plugins: bool = False
    recipe: bool = False

    def given(self) -> list[str]:
        """The options that are not as they are by default, as they are typed: "--strip-weights"."""
        names = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return ["--" + _TYPED.get(name, name).replace("_", "-") for name in names]

    def document(self) -> dict[str, Any]:
        """All of them but ``recipe`` as JSON has them; ``PlanOptions.of`` reads it back."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "recipe"}
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> PlanOptions:
        """From a document; InputError for a range that is none, TypeError for a name that is no option."""
        read = {name: parsed_range(name, document.get(name)) for name in ("batch", "length")}
        targets = parsed_targets(document.get("targets"))
        return cls(**{**document, **read, "targets": targets})


PLAN_OPTIONS = PlanOptions()
_TYPED = {"targets": "target", "strip": "strip_weights"}


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Range) else list(value) if isinstance(value, tuple) else value


def parsed_range(option: str, text: str | None) -> Range | None:
    """``"1:8:32"``: smallest, usual and largest size; one number is all three. InputError says what is wrong."""
    if text is None:
        return None
    parts = text.replace(",", ":").split(":")
    if not all(part.strip().isdecimal() for part in parts) or len(parts) not in (1, 3):
        raise InputError(describe(f"--{option}", got=repr(text), expected="smallest:usual:largest, like 1:8:32"))
    sizes = [int(part) for part in parts] * (3 // len(parts))
    if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        raise InputError(describe(f"--{option}", got=repr(text), expected="1 <= smallest <= usual <= largest"))
    return Range(*sizes)


def parsed_targets(text: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """``"sm86,sm89"``, each once and in order; what there is depends on the library, which is asked later."""
    if text is None:
        return None
    names = [name.strip().lower() for name in (text.split(",") if isinstance(text, str) else text)]
    wrong = [name for name in names if not (name.startswith("sm") and name[2:].isdecimal())]
    if wrong:
        raise InputError(describe("--target", got=repr(wrong[0]), expected="compute capabilities like sm86,sm89"))
    return tuple(sorted(set(names), key=lambda name: int(name[2:])))
