"""When a row may leave early: a statistic of an exit's logits against that exit's threshold. Pure numpy.

Letters: E exits of a variant, the last at its full depth; K rows; C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from compexport.errors import InputError, describe
from engines.strict_json import is_finite

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

NEVER = -1.0
ENTROPY, MAX_PROBABILITY, MARGIN = "entropy", "max_probability", "margin"
STATISTICS = (ENTROPY, MAX_PROBABILITY, MARGIN)
PER_ROW, BATCH_MAXIMUM = "per-row", "batch-maximum"
MODES = (PER_ROW, BATCH_MAXIMUM)


@dataclass(frozen=True, slots=True)
class ExitRule:
    """A row leaves at the first exit that is sure enough of it; at the last exit every row leaves.

    ``thresholds``: one for all exits, or one for each but the last; any sequence is kept as a tuple. "entropy" (natural
    logarithm) must be below its threshold, "max_probability" and "margin" above, all strictly; -1 never lets a row
    leave. ``mode`` "per-row" judges each row alone; "batch-maximum" is the official code's: the whole batch leaves
    together, once its least sure row may. ``temperatures``, one per exit but the last, divide the logits before they
    are judged, and only then.

    Raises InputError for what is none of this: NaN, a negative threshold other than -1, an unknown name.
    """

    thresholds: float | Sequence[float]
    statistic: str = ENTROPY
    mode: str = PER_ROW
    temperatures: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for what, got, choices in (("exit statistic", self.statistic, STATISTICS), ("exit mode", self.mode, MODES)):
            if got not in choices:
                raise InputError(describe(f"unknown {what}", got=got, expected=f"one of {', '.join(choices)}"))
        several = isinstance(self.thresholds, Sequence | np.ndarray) and not isinstance(self.thresholds, str | bytes)
        listed: Any = self.thresholds if several else (self.thresholds,)
        given = [_number(value) for value in listed]
        for value in given:
            if not is_finite(value) or (value < 0 and value != NEVER):
                expected = f"a finite number >= 0, or {NEVER:g} for never"
                raise InputError(describe("exit threshold is out of range", got=repr(value)[:80], expected=expected))
        object.__setattr__(self, "thresholds", tuple(given) if several else given[0])
        if self.temperatures is None:
            return
        temperatures = [_number(value) for value in self.temperatures]
        for value in temperatures:
            if not is_finite(value) or value <= 0:
                got, expected = repr(value)[:80], "a number > 0"
                raise InputError(describe("exit temperature is out of range", got=got, expected=expected))
        object.__setattr__(self, "temperatures", tuple(temperatures))

    def checked(self, exits: int) -> ExitRule:
        """This rule with one threshold for each of ``exits`` but the last; InputError for lists of another length."""
        early = exits - 1
        single = isinstance(self.thresholds, float)
        thresholds = (self.thresholds,) * early if isinstance(self.thresholds, float) else self.thresholds
        for what, values in (("thresholds", thresholds), ("temperatures", self.temperatures)):
            if values is not None and len(values) != early:
                expected = f"{early}, one for each exit but the last" + (", or one for all" if single else "")
                raise InputError(describe(f"exit {what} do not fit", got=f"{len(values)} of them", expected=expected))
        return ExitRule(thresholds, self.statistic, self.mode, self.temperatures)

    def leaves(self, number: int, outputs: Mapping[str, Array]) -> Bools:
        """Which of K rows may leave at exit ``number`` (from 0, not the last), from what its segment returned.

        ``outputs``: the statistic [K]; with temperatures, ``logits`` [K, C]. NaN never leaves.
        """
        assert isinstance(self.thresholds, tuple), "checked() comes first"
        values = self.judged(number, outputs)
        sure = is_sure(self.statistic, values, self.thresholds[number])
        if self.mode == BATCH_MAXIMUM:
            return np.full(len(values), bool(sure.all()))
        return sure

    def judged(self, number: int, outputs: Mapping[str, Array]) -> Array:
        """The values [K] that exit ``number`` compares with its threshold."""
        if self.temperatures is None:
            return outputs[self.statistic]
        return statistic_of(self.statistic, outputs["logits"].astype(np.float64) / self.temperatures[number])

    def needs(self) -> tuple[str, ...]:
        """The outputs of a segment that ``leaves`` reads."""
        return ("logits",) if self.temperatures is not None else (self.statistic,)

    def document(self) -> dict[str, Any]:
        """This rule as plain JSON values."""
        thresholds = list(self.thresholds) if isinstance(self.thresholds, tuple) else self.thresholds
        found: dict[str, Any] = {"statistic": self.statistic, "mode": self.mode, "thresholds": thresholds}
        return {**found, **({"temperatures": list(self.temperatures)} if self.temperatures is not None else {})}

    @classmethod
    def from_document(cls, document: object) -> ExitRule:
        """The rule of a JSON object; InputError for one that ``document`` would not write."""
        if not isinstance(document, Mapping) or "thresholds" not in document or not set(document) <= _KEYS:
            expected = f"an object with {', '.join(sorted(_KEYS))}"
            raise InputError(describe("exit rule", got=str(document)[:80], expected=expected))
        thresholds, temperatures = document["thresholds"], document.get("temperatures")
        if not isinstance(temperatures, list | None):
            raise InputError(describe("exit temperatures", got=temperatures, expected="a list"))
        return cls(
            tuple(thresholds) if isinstance(thresholds, list) else thresholds,
            str(document.get("statistic", ENTROPY)),
            str(document.get("mode", PER_ROW)),
            None if temperatures is None else tuple(temperatures),
        )


_KEYS = {"thresholds", "statistic", "mode", "temperatures"}


def is_sure(statistic: str, values: Array, threshold: float | Floats) -> Bools:
    """Where ``values`` pass ``threshold``; false for NaN, and everywhere for a threshold of -1.

    Compared in float64: a threshold lies between two neighbouring values in fp32, and rounded it would be one of them.
    """
    wide = np.asarray(values, np.float64)
    passed = wide < threshold if statistic == ENTROPY else wide > threshold
    return np.asarray(passed & (np.asarray(threshold) != NEVER))


def statistic_of(statistic: str, logits: Array) -> Floats:
    """``statistic`` over the last axis of ``logits`` [..., C], in float64; finite for any finite logits."""
    wide = logits.astype(np.float64)
    logs = wide - wide.max(axis=-1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(axis=-1, keepdims=True))
    probabilities = np.exp(logs)
    if statistic == ENTROPY:
        return np.asarray(-(probabilities * logs).sum(axis=-1))
    if statistic == MAX_PROBABILITY or probabilities.shape[-1] == 1:
        return np.asarray(probabilities.max(axis=-1))
    best = np.partition(probabilities, -2, axis=-1)
    return np.asarray(best[..., -1] - best[..., -2])


def thresholds_of(values: Sequence[float]) -> float | tuple[float, ...]:
    """One number for all exits, or several for each."""
    return values[0] if len(values) == 1 else tuple(values)


def _number(value: Any) -> Any:
    """A float for every number that one can hold, numpy's too; anything else as it is, to be refused."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    try:
        return float(value)
    except OverflowError:
        return value


TO_THE_END = ExitRule(NEVER)
