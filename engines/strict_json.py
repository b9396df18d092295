"""JSON as a bundle may hold it: UTF-8, no NaN, no key twice, not deep. Anything else is refused, never guessed."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64
MAX_DIGITS = 400  # of a whole number; no float holds that many


def parse(raw: bytes) -> Any:
    """The value of a JSON document; raises ValueError with a one-line reason."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON (line {error.lineno} column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it has the key {ascii(twice)[:100]} twice in one object")
    return result


def _constant(name: str) -> float:
    raise ValueError(f"it has {name}, which is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it has a number too large to hold")
    return value


def _int(text: str) -> int:
    # Digits are counted first: reading millions of them takes time that grows with their square.
    value = int(text) if len(text) <= MAX_DIGITS else math.inf
    if not is_finite(value):
        raise ValueError("it has a number too large to hold")
    return int(value)


def is_finite(value: object) -> bool:
    """Whether ``value`` is a number that a float can hold; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _check_depth(value: Any) -> None:
    pending = [(value, 1)]
    while pending:
        node, depth = pending.pop()
        if not isinstance(node, dict | list):
            continue
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        pending += [(child, depth + 1) for child in (node.values() if isinstance(node, dict) else node)]
