"""How much of a fit is done, and the learning rate that goes with it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from calib import processes

WARM_UP_SHARE = 0.05


@dataclass
class Clock:
    """How much of a fit is done, by steps or by seconds, whichever is further.

    Times are of ``time.monotonic``, s. ``started``: of the run, its reading and starting included. ``warm_up``: the
    share of it in which the learning rate rises.
    """

    started: float
    steps: int
    max_seconds: float | None = None
    stepping: float | None = field(default=None)  # when the first step began
    warm_up: float = WARM_UP_SHARE

    def begin_steps(self) -> None:
        """The first step begins; a resumed run has begun before."""
        if self.stepping is None:
            self.stepping = time.monotonic()

    def share(self, step: int) -> float:
        """0 at the first step, 1 when ``steps`` or ``max_seconds`` are used up; the same in all processes."""
        share = step / self.steps
        if self.max_seconds is not None:
            now = time.monotonic()
            begun = self.stepping if self.stepping is not None else now
            # However long the start took (a busy machine), half of the time is for steps: few steps are worth nothing.
            left = max(self.max_seconds - (begun - self.started), self.max_seconds / 2)
            share = processes.agreed(max(share, (now - begun) / left))
        return min(share, 1.0)

    def learning_rate(self, step: int) -> float:
        """The factor of the peak learning rate: a short rise, then a straight line down to 0."""
        share = self.share(step)
        # Never 0 at the first step, which would be wasted.
        return min(1.0, (share + 1 / self.steps) / self.warm_up) * (1.0 - share)

    def record(self) -> dict[str, Any]:
        """What a later process needs to go on: seconds since the start, and at the first step."""
        now = time.monotonic()
        stepping = self.stepping if self.stepping is not None else now
        return {"elapsed_s": now - self.started, "stepping_s": stepping - self.started}

    def go_on(self, record: dict[str, Any]) -> None:
        """Continue as if no time had passed since ``record`` was made."""
        self.started = time.monotonic() - float(record["elapsed_s"])
        self.stepping = self.started + float(record["stepping_s"])
