"""Operating points: an engine with exits and the rule by which its rows leave, as a member of the family.

``evaluate`` finds them and keeps them in ``quality.json``; a point is named ``<variant>@<point>``. Letters: E exits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compexport.errors import BundleError, InputError, describe
from engines.exit_rule import TO_THE_END, ExitRule
from engines.strict_json import is_finite

_SEPARATOR = "@"
_TOKEN = re.compile(r"/token(?:-(\d{1,9}))?$")
_HINT = "run `compexport evaluate` again"


def engine_of(name: str) -> str:
    """The variant whose engines answer for ``name``, which may be one of its points."""
    return name.partition(_SEPARATOR)[0]


def is_point(name: str) -> bool:
    """Whether ``name`` is that of an operating point."""
    return _SEPARATOR in name


def point_name(variant: str, point: str) -> str:
    """The name of a variant's operating point."""
    return f"{variant}{_SEPARATOR}{point}"


def segment_name(variant: str, number: int) -> str:
    """Under which name a profile holds the times of segment ``number`` (from 0)."""
    return f"{variant}/segment-{number}"


def encoder_name(variant: str) -> str:
    """Under which name a profile holds the times of reading texts, before anything is written."""
    return f"{variant}/encoder"


def first_token_name(variant: str) -> str:
    """Under which name a profile holds the times of a first token, after texts of its length were read."""
    return f"{variant}/first-token"


def token_name(variant: str, written: int | None = None) -> str:
    """Under which name a profile holds the times of one more token.

    Of a model that writes on, its length says after how many. Of one that reads one text and writes another the length
    is that of the text read, and ``written`` says how many tokens stand before the one more.
    """
    return f"{variant}/token" if written is None else f"{variant}/token-{written}"


def variant_of(name: str) -> str:
    """The variant that a profile's row of this name is of, as a whole or in part."""
    return name.partition("/")[0]


def is_segment(name: str) -> bool:
    """Whether a profile's row of this name is one segment's."""
    return "/segment-" in name


def is_token(name: str) -> bool:
    """Whether a profile's row of this name is one more token's."""
    return _TOKEN.search(name) is not None


def written_before(name: str) -> int | None:
    """How many tokens stand before the one more that a row of this name is of; None where its length says that."""
    found = _TOKEN.search(name)
    return int(found[1]) if found is not None and found[1] is not None else None


def is_part(name: str) -> bool:
    """Whether a profile's row of this name is of a part of a variant's work, not of a variant."""
    return "/" in name


@dataclass(frozen=True, slots=True)
class Point:
    """One way to use the exits of ``variant``.

    ``histogram`` [E]: the share of rows that leave at each exit. ``cut_values`` [E]: the metric when every row must
    have left by that exit, None where it was not measured.
    """

    variant: str
    rule: ExitRule
    histogram: tuple[float, ...]
    cut_values: tuple[float, ...] | None


def points_of(table: Mapping[str, Any] | None, exits: Mapping[str, int]) -> dict[str, Point]:
    """The points in ``quality.json`` of the variants in ``exits``, which gives the number of exits of each.

    Raises BundleError that names a point which does not fit its variant.
    """
    found = {}
    for name, entry in _section(table, "points").items():
        variant = engine_of(name)
        if variant in exits:
            found[name] = _point(name, variant, entry, exits[variant])
    return found


def to_the_end(table: Mapping[str, Any] | None, exits: Mapping[str, int]) -> dict[str, Point]:
    """The variants in ``exits`` themselves: no row leaves early, unless time is short."""
    found = {}
    sections = _section(table, "exits")
    for variant, count in exits.items():
        entry = sections.get(variant)
        values = None if entry is None else _numbers(variant, entry, "values", count)
        found[variant] = Point(variant, TO_THE_END, (*([0.0] * (count - 1)), 1.0), values)
    return found


def _section(table: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    section = {} if table is None else table.get(name, {})
    if not isinstance(section, Mapping):
        raise BundleError(describe(f"quality table: {name}", got=str(section)[:80], expected="an object", hint=_HINT))
    return section


def _point(name: str, variant: str, entry: object, count: int) -> Point:
    if not isinstance(entry, Mapping):
        raise BundleError(describe(f"quality table, point {name}", got=entry, expected="an object", hint=_HINT))
    point = name.removeprefix(point_name(variant, ""))
    if not point or _SEPARATOR in point or not is_point(name):
        expected = point_name(variant, "NAME")
        raise BundleError(describe("quality table: a point's name", got=name, expected=expected, hint=_HINT))
    if entry.get("variant") != variant:
        what = f"quality table, point {name}: variant"
        raise BundleError(describe(what, got=str(entry.get("variant"))[:80], expected=variant, hint=_HINT))
    histogram = _numbers(name, entry, "histogram", count)
    if min(histogram) < 0 or not math.isclose(sum(histogram), 1.0, abs_tol=1e-6):
        what = f"quality table, point {name}: histogram"
        raise BundleError(describe(what, got=list(histogram), expected="shares that add up to 1", hint=_HINT))
    try:
        rule = ExitRule.from_document(entry.get("rule")).checked(count)
    except InputError as error:
        raise BundleError(describe(f"quality table, point {name}: {error}", hint=_HINT)) from None
    values = _numbers(name, entry, "cut_values", count) if "cut_values" in entry else None
    return Point(variant, rule, histogram, values)


def _numbers(name: str, entry: object, key: str, count: int) -> tuple[float, ...]:
    values = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(values, list) or len(values) != count or not all(map(is_finite, values)):
        what = f"quality table, {name}: {key}"
        raise BundleError(describe(what, got=str(values)[:80], expected=f"{count} finite numbers", hint=_HINT))
    return tuple(float(value) for value in values)
