"""Which number of steps each batch is trained with: drawn at random, and the same whoever asks again.

Letters: N iterations of the model, n steps taken instead.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from calib.ode.settings import OdeSettings
from compexport.errors import InputError, describe
from exporter.methods.ode import Form, Stepping


@dataclass(frozen=True)
class Draws:
    """The steps of every batch: n uniformly from ``lowest`` to N, shared out among the groups, and one of ``forms``.

    ``groups``: iterations of each group. A draw follows from ``seed`` and the number of the training step alone, so
    that all processes, and a run that goes on, draw alike.
    """

    groups: tuple[int, ...]
    lowest: int
    forms: tuple[Form, ...]
    seed: int

    @classmethod
    def of(cls, groups: Sequence[int], settings: OdeSettings) -> Draws:
        """As the settings say; InputError for a range that the model does not have."""
        full = sum(groups)
        lowest = full if settings.plain else (settings.lowest or -(-full // 2))
        if not len(groups) <= lowest <= full:
            expected = f"{len(groups)} to {full}, what the model has"
            raise InputError(describe("fewest steps", got=lowest, expected=expected))
        forms: tuple[Form, ...] = ("block", "sublayer") if settings.form == "auto" else (settings.form,)
        return cls(tuple(groups), lowest, forms, settings.seed)

    def at(self, step: int) -> Stepping:
        """The steps of one batch."""
        draw = random.Random(f"{self.seed} {step}")
        n = draw.randint(self.lowest, sum(self.groups))
        return Stepping.even(self.groups, shared_out(n, self.groups), draw.choice(self.forms))


def shared_out(n: int, groups: Sequence[int]) -> list[int]:
    """``n`` steps over groups in proportion to their iterations, by the largest remainders; at least 1 for each."""
    exact = [n * count / sum(groups) for count in groups]
    counts = [max(1, int(share)) for share in exact]
    while sum(counts) != n:
        change = 1 if sum(counts) < n else -1
        open_ones = [i for i, count in enumerate(counts) if change > 0 or count > 1]
        counts[max(open_ones, key=lambda i: change * (exact[i] - counts[i]))] += change
    return counts
