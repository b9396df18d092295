"""Keeping a budget while a request runs: when its chunks must be over, and what comes after the engine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence


class Aftercare:
    """How long a request takes after its engine is done: logits into answers, and out. Thread-safe.

    Time is kept per row. What is reserved is the 95th percentile of the latest observations: their longest would be
    whatever interrupted one of them, and make every request after it stop early.
    """

    REMEMBERED = 128
    UNSEEN_MS = 0.05  # per row, before anything was observed
    FIXED_MS = 0.1  # whatever the rows

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._per_row: deque[float] = deque(maxlen=self.REMEMBERED)

    def observe(self, rows: int, ms: float) -> None:
        """Tell that what came after the engine took ``ms`` for so many rows."""
        with self._lock:
            self._per_row.append(max(ms - self.FIXED_MS, 0.0) / rows)

    def reserve_ms(self, rows: int) -> float:
        """The time to keep for so many rows."""
        with self._lock:
            seen = sorted(self._per_row)
        return self.FIXED_MS + rows * (seen[-1 - len(seen) // 20] if seen else self.UNSEEN_MS)


class Margin:
    """By how much earlier than its budget ends a request stops, learnt from how many were late. Thread-safe.

    A late request widens the margin, one in time narrows it by so much less that, whatever interrupts this machine, a
    share ``LATE`` of them is late in the long run (adaptive conformal inference: Gibbs and Candès 2021,
    arXiv 2106.00170). The margin is a share of what a whole run takes.
    """

    LATE = 0.005
    WIDER = 0.05  # after one that was late
    WIDEST = 0.5  # beyond it, what makes requests late is nothing that an earlier end would mend

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.share = 0.0

    def observe(self, late: bool) -> None:
        """Tell how a request ended that could have stopped earlier."""
        change = self.WIDER * ((1.0 if late else 0.0) - self.LATE)
        with self._lock:
            self.share = min(max(self.share + change, 0.0), self.WIDEST)


def chunk_end_s(now_s: float, end_s: float, chunks: Sequence[tuple[float, float]]) -> float:
    """When the first of ``chunks`` must be over so that all of them are by ``end_s``.

    Each chunk is (ms of its first segment, ms of all its segments). The time left is shared out by what whole runs
    would take, and later chunks keep enough for their first segments at least.
    """
    later_s = sum(first_ms for first_ms, _ in chunks[1:]) / 1000.0
    whole = sum(whole_ms for _, whole_ms in chunks)
    share = chunks[0][1] / whole if whole else 1.0 / len(chunks)
    return min(end_s - later_s, now_s + (end_s - now_s) * share)
