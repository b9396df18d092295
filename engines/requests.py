"""A request on its way: what it asked for, cut into engine runs, and which variant was chosen for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.exit_rule import ExitRule
from engines.options import Options
from engines.points import engine_of
from engines.selector import Decision
from engines.text import EncodedText


@dataclass(frozen=True, slots=True)
class Request:
    """A request whose variant was chosen. ``chunks``: the numbers of the texts of each engine run, ``shapes`` [B, S].

    ``options``: how its texts are written, where that is the task; ``rule``: how rows leave early. ``began_s`` and
    ``end_s`` (perf_counter): when it came, and when it must be answered, None without a budget.
    """

    decision: Decision
    encoded: list[EncodedText]
    chunks: list[list[int]]
    shapes: list[tuple[int, int]]
    options: Options | None
    rule: ExitRule
    budget_ms: float | None
    began_s: float
    end_s: float | None

    @property
    def engine(self) -> str:
        """The variant whose engines answer."""
        return engine_of(self.decision.variant)

    def texts_of(self, number: int) -> list[EncodedText]:
        """The texts of a chunk."""
        return [self.encoded[index] for index in self.chunks[number]]


def chunked(encoded: Sequence[EncodedText], size: int) -> list[list[int]]:
    """Positions of the texts of every engine run, at most ``size`` each: neighbours in length, to pad little."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    return [order[first : first + size] for first in range(0, len(order), size)]


def shape_of(chunk: Sequence[EncodedText]) -> tuple[int, int]:
    """Batch and padded length [B, S] of one engine run."""
    return len(chunk), max(map(len, chunk))
