"""How long writing takes: a time to the first token, and one for each token after it.

Letters: B batch, S tokens read, T tokens written before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from engines.lengths import Expected
from engines.points import is_part, is_token, token_name, variant_of, written_before
from engines.profile import Prediction, Profile

NOTHING = Prediction(0.0, 0.0)


class WritingTimes:
    """What the profile of one device says of variants that write; immutable."""

    def __init__(self, profile: Profile) -> None:
        """Variants whose tokens were not measured are left out."""
        self._profile = profile
        measured = set(profile.variants)
        self._written: dict[str, list[int]] = {}
        for name in profile.variants:
            if is_token(name) and variant_of(name) in measured:
                before = written_before(name)
                self._written.setdefault(variant_of(name), []).extend([] if before is None else [before])
        for written in self._written.values():
            written.sort()

    def knows(self, variant: str) -> bool:
        """Whether a variant's tokens were measured."""
        return variant in self._written

    def first_token(self, variant: str, batch: int, length: int) -> Prediction:
        """Reading B texts of S tokens, and a first token for each."""
        return self._profile.predict(variant, batch, length)

    def token(self, variant: str, rows: int, length: int, written: int) -> Prediction:
        """One more token for ``rows`` texts, each of S tokens, after T others.

        Of a model that reads one text and writes another, by the line through the two numbers of tokens that were
        measured, from the first of them on; beyond the last it is extrapolated.
        """
        measured = self._written[variant]
        if not measured:
            return self._profile.predict(token_name(variant), rows, length + written)
        times = self._profile.predict_all(rows, length)
        first, last = (times[token_name(variant, before)] for before in (measured[0], measured[-1]))
        if written <= measured[0] or len(measured) == 1:
            return first
        share = (written - measured[0]) / (measured[-1] - measured[0])
        p50_ms, p99_ms = (
            a + max(share * (b - a), 0.0)  # what was measured to be faster with more tokens was noise
            for a, b in ((first.p50_ms, last.p50_ms), (first.p99_ms, last.p99_ms))
        )
        return Prediction(p50_ms, max(p50_ms, p99_ms), first.extrapolated or written > measured[-1])

    def later_tokens(self, variant: str, rows: int, length: int, tokens: int) -> Prediction:
        """All of so many tokens but the first. Their time grows evenly, so the one in the middle stands for all.

        What makes one step slow, another process or an interrupt, is gone with the next: spreads add up as those of
        independent times do, by their squares. What slows all of them alike is the live correction's.
        """
        count = tokens - 1
        if count < 1:
            return NOTHING
        start = 0 if not self._written[variant] else 1  # the first step of a second text has its first token alone
        middle = self.token(variant, rows, length, start + (count - 1) // 2)
        usual_ms = count * middle.p50_ms
        spread_ms = math.sqrt(count) * (middle.p99_ms - middle.p50_ms)
        return Prediction(usual_ms, usual_ms + spread_ms, middle.extrapolated)

    def writing(
        self, shapes: Sequence[tuple[int, int]], expected: Sequence[Expected], beams: int = 1
    ) -> Mapping[str, Prediction]:
        """Writing to (B, S) chunks after each other, as many tokens to each as ``expected``, for every variant.

        p50 is that of the usual length, p99 that of the length that one batch in a hundred exceeds. Texts that end
        early leave the batch, so both are bounds. With ``beams`` a text is as many rows.
        """
        whole = self._profile.predict_chunks(shapes)
        found = {name: one for name, one in whole.items() if not is_part(name) and self.knows(name)}
        for name in found:
            for (batch, length), tokens in zip(shapes, expected, strict=True):
                usual = self.later_tokens(name, batch * beams, length, tokens.p50)
                most = usual if tokens.p99 == tokens.p50 else self.later_tokens(name, batch * beams, length, tokens.p99)
                later = Prediction(usual.p50_ms, most.p99_ms, most.extrapolated or tokens.extrapolated)
                found[name] = found[name] + later
        return found

    def step_ms(self, variant: str, length: int, factor: float) -> Callable[[int, int], float]:
        """What a step of so many rows over so many tokens takes, p99: quick to ask again and again.

        The usual time is multiplied by ``factor``, the live correction; interrupts are as long on a slow machine.
        ``length``: tokens read, S. What is kept of a model that writes on are the tokens read too.
        """
        reads_two = bool(self._written[variant])
        lines: dict[int, tuple[float, float]] = {}

        def line(rows: int) -> tuple[float, float]:
            """The first step, and by how much each further token makes it longer."""
            near, far = (self.token(variant, rows, length, written).slowed_ms(factor) for written in (1, 1 + _FAR))
            return near, (far - near) / _FAR

        def step_ms(rows: int, past: int) -> float:
            if rows not in lines:
                lines[rows] = line(rows)
            near, slope = lines[rows]
            written = past if reads_two else past - length
            return near + slope * (written - 1)

        return step_ms


_FAR = 64
