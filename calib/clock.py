"""How much of a fit is done, and the learning rate that goes with it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from calib.settings import FitSettings

WARM_UP_SHARE = 0.05


@dataclass
class Clock:
    """How much of a fit is done, by steps or by seconds, whichever is further."""

    started: float
    settings: FitSettings
    stepping: float | None = field(default=None)  # when the first step began

    def share(self, step: int) -> float:
        """0 at the first step, 1 when ``steps`` or ``max_seconds`` are used up."""
        share = step / self.settings.steps
        if self.settings.max_seconds is not None:
            now = time.monotonic()
            begun = self.stepping if self.stepping is not None else now
            # However long the start took (a busy machine), half of the time is for steps: few steps are worth nothing.
            left = max(self.settings.max_seconds - (begun - self.started), self.settings.max_seconds / 2)
            share = max(share, (now - begun) / left)
        return min(share, 1.0)

    def learning_rate(self, step: int) -> float:
        """The factor of the peak learning rate: a short rise, then a straight line down to 0."""
        share = self.share(step)
        # Never 0 at the first step, which would be wasted.
        return min(1.0, (share + 1 / self.settings.steps) / WARM_UP_SHARE) * (1.0 - share)
