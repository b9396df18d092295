"""Keeping a budget while a request runs: when its chunks must be over, and what comes after the engine."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

from engines.answers import Answer
from engines.cascade import Deadline, ExitRun
from engines.forecast import Forecast
from engines.generate import StepDeadline
from engines.members import Members
from engines.profile import Prediction
from engines.selector import Correction
from engines.writing_time import WritingTimes

_log = logging.getLogger(__name__)


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

    A late request widens the margin by two parts. Of one, each request in time takes back so much less that, whatever
    interrupts this machine, a share ``LATE`` of them is late in the long run (adaptive conformal inference: Gibbs and
    Candès 2021, arXiv 2106.00170). The other, and larger, part answers a burst: it halves with every ``HALF_LIFE``
    requests in time, so that what has passed costs later requests little. The margin is a share of what a whole run
    takes. While it is at its widest, late requests widen neither: no earlier end would mend what makes them late.
    """

    LATE = 0.005
    LASTING, PASSING = 0.01, 0.04  # what one that was late adds
    HALF_LIFE = 30  # requests in time
    WIDEST = 0.5

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.lasting, self.passing = 0.0, 0.0

    @property
    def share(self) -> float:
        return min(self.lasting + self.passing, self.WIDEST)

    def observe(self, late: bool) -> None:
        """Tell how a request ended that could have stopped earlier."""
        with self._lock:
            if not late:
                self.lasting = max(self.lasting - self.LASTING * self.LATE, 0.0)
                self.passing *= 0.5 ** (1.0 / self.HALF_LIFE)
            elif self.lasting + self.passing < self.WIDEST:
                self.lasting += self.LASTING * (1.0 - self.LATE)
                self.passing += self.PASSING


def chunk_end_s(now_s: float, end_s: float, chunks: Sequence[tuple[float, float]]) -> float:
    """When the first of ``chunks`` must be over so that all of them are by ``end_s``.

    Each chunk is (ms of its first segment, ms of all its segments). The time left is shared out by what whole runs
    would take, and later chunks keep enough for their first segments at least.
    """
    later_s = sum(first_ms for first_ms, _ in chunks[1:]) / 1000.0
    whole = sum(whole_ms for _, whole_ms in chunks)
    share = chunks[0][1] / whole if whole else 1.0 / len(chunks)
    return min(end_s - later_s, now_s + (end_s - now_s) * share)


class OwnPace:
    """What the next step of one generation takes, told by those before it: as long as the slowest of the last few."""

    REMEMBERED = 8

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._before_s: float | None = None
        self._taken_ms: deque[float] = deque(maxlen=self.REMEMBERED)

    def __call__(self, rows: int, past: int) -> float:
        """Milliseconds; to be asked before every step. Of the first nothing is known."""
        now_s = self._clock()
        if self._before_s is not None:
            self._taken_ms.append((now_s - self._before_s) * 1000.0)
        self._before_s = now_s
        return max(self._taken_ms, default=0.0)


class Anytime:
    """What the requests of one runtime tell each other: how late this machine is now, and by what each must stop.

    Threads may share it.
    """

    def __init__(self, members: Members, correction: Correction, device: str, *, hint: str) -> None:
        """``device``: where the members were, or were not, measured; ``hint``: how to measure them."""
        self._members = members
        self._correction = correction
        self._device = device
        self._hint = hint
        self.aftercare = Aftercare()
        self.margin = Margin()
        self._warned: set[str] = set()  # engines whose segments were not measured

    def deadline(self, engine: str, end_s: float | None, shapes: Sequence[tuple[int, int]]) -> Deadline | None:
        """Until when the chunk of the first of ``shapes`` [B, S] must be through; None when that cannot be said.

        ``end_s`` (perf_counter): when the whole request must be answered, None without a budget.
        """
        if end_s is None:
            return None
        forecast = self._forecast(engine)
        if forecast is None:
            if engine not in self._warned:
                self._warned.add(engine)
                what = "%s: its segments were not measured on %s, so it cannot stop early to keep a budget; %s"
                _log.warning(what, engine, self._device, self._hint)
            return None
        factor = self._correction.factor(engine)
        length = shapes[0][1]

        def needs_ms(segment: int, rows: int) -> float:
            return forecast.segment_ms(engine, segment, rows, length).p99_ms * factor

        chunks = [forecast.first_and_whole_ms(engine, *shape) for shape in shapes]
        corrected = [(first_ms * factor, whole_ms * factor) for first_ms, whole_ms in chunks]
        return Deadline(self._chunk_end_s(end_s, shapes, corrected), needs_ms)

    def step_deadline(
        self,
        engine: str,
        end_s: float,
        times: WritingTimes,
        shapes: Sequence[tuple[int, int]],
        whole: Sequence[Prediction],
    ) -> StepDeadline:
        """``deadline`` of a variant that writes. ``whole``: what each chunk is predicted to take."""
        factor = self._correction.factor(engine)
        first = [times.first_token(engine, *shape) for shape in shapes]
        chunks = [(one.slowed_ms(factor), all_.slowed_ms(factor)) for one, all_ in zip(first, whole, strict=True)]
        return StepDeadline(self._chunk_end_s(end_s, shapes, chunks), times.step_ms(engine, shapes[0][1], factor))

    def own_pace(self, end_s: float, shapes: Sequence[tuple[int, int]]) -> StepDeadline:
        """``step_deadline`` where nothing was measured: chunks share the time evenly, and go by their own steps."""
        chunks = [(0.0, 1.0)] * len(shapes)
        reserve_ms = self.aftercare.reserve_ms(sum(batch for batch, _ in shapes))
        return StepDeadline(chunk_end_s(perf_counter(), end_s - reserve_ms / 1000.0, chunks), OwnPace())

    def _chunk_end_s(
        self, end_s: float, shapes: Sequence[tuple[int, int]], chunks: Sequence[tuple[float, float]]
    ) -> float:
        """``chunk_end_s`` of the first of ``chunks``, which take so long now, with what is kept for afterwards."""
        reserve_ms = self.aftercare.reserve_ms(sum(batch for batch, _ in shapes))
        reserve_ms += self.margin.share * sum(whole_ms for _, whole_ms in chunks)
        return chunk_end_s(perf_counter(), end_s - reserve_ms / 1000.0, chunks)

    def observe(self, variant: str, expected: Prediction, engine_ms: float) -> None:
        """Tell what a run took. Outside the grid a prediction is a bound, so that only more than it says something."""
        if not expected.extrapolated or engine_ms > expected.p99_ms:
            self._correction.observe(variant, engine_ms, expected.p50_ms)

    def observe_segments(self, engine: str, length: int, run: ExitRun) -> None:
        """Compare the segments that ran with what they were expected to take together."""
        forecast = self._forecast(engine)
        if forecast is None:
            return
        expected = Prediction(0.0, 0.0)
        for number, (rows, _) in enumerate(run.segments):
            expected += forecast.segment_ms(engine, number, rows, length)
        self.observe(engine, expected, sum(ms for _, ms in run.segments))

    def observe_request(self, engine: str, outputs: Sequence[Answer], *, late: bool) -> None:
        """Tell how a request with a budget ended; what could not have ended earlier says nothing of the margin."""
        if self._members.writing_times is not None and self._members.writing_times.knows(engine):
            earlier = any(len(output["tokens"]) > 1 for output in outputs)
        elif self._forecast(engine) is not None:
            earlier = any(output["exit"] > self._members.layers[engine][0] for output in outputs)
        else:
            return
        if earlier:
            self.margin.observe(late)

    def _forecast(self, engine: str) -> Forecast | None:
        """What is predicted of the segments of a variant; None where they were not measured, or there are none."""
        forecast = self._members.forecast
        return forecast if forecast is not None and forecast.knows(engine) else None
