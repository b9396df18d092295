"""The part of a runtime that chooses: what a request asks for, and which variant answers it.

Letters: B batch, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter

from compexport.errors import InputError, describe
from engines.bundle import Bundle
from engines.exit_rule import TO_THE_END, ExitRule
from engines.lengths import Expected
from engines.members import Members, Predictions
from engines.opening import Opening
from engines.options import Options
from engines.points import engine_of
from engines.profile import check_count
from engines.requests import Request, chunked, shape_of
from engines.selector import Correction, Decision, decide, time_left_ms
from engines.text import Text
from engines.writer import Writer
from engines.writing import room_for, rows_per_text

LARGEST_BATCH = 32  # what one engine run takes at most when no profile says what was measured


class Chooser:
    """Of one bundle on one device. Threads may share it."""

    def __init__(
        self, bundle: Bundle, members: Members, correction: Correction, opening: Opening, writer: Writer, device: str
    ) -> None:
        self._bundle = bundle
        self._members = members
        self._correction = correction
        self._opening = opening
        self._writer = writer
        self._device = device

    def request(
        self,
        texts: Sequence[Text],
        options: Options | None,
        budget_ms: float | None,
        forced: str | None,
        rule: ExitRule | None,
        truncate: bool,
        waited_ms: float,
    ) -> Request:
        """Tokenise a request, cut it into chunks, and decide which variant answers; its clock starts here."""
        time_left_ms(budget_ms, waited_ms)
        room = None if options is None else room_for(self._bundle.manifest, options)
        self._refuse_unmeasured(budget_ms, forced)
        encoder = self._opening.encoder()
        self._members.load()
        self._opening.open([engine_of(name) for name in self._likely(budget_ms, forced)])
        started = perf_counter()
        encoded = encoder.encode(texts, truncate=truncate, room=room)
        largest = self._members.profile.largest_batch if self._members.profile is not None else LARGEST_BATCH
        chunks = chunked(encoded, max(1, largest // (1 if options is None else rows_per_text(options))))
        shapes = [shape_of([encoded[index] for index in chunk]) for chunk in chunks]
        (predictions, rungs), expected = self._predict(shapes, options)
        decision = decide(
            predictions,
            self._members.quality,
            self._correction,
            budget_ms=budget_ms,
            waited_ms=waited_ms + (perf_counter() - started) * 1000.0,
            forced=forced,
            rungs=rungs,
            expected=expected,
        )
        end_s = None if budget_ms is None or budget_ms == math.inf else started + (budget_ms - waited_ms) / 1000.0
        rule = rule or self._members.rule(decision.variant) or TO_THE_END
        return Request(decision, encoded, chunks, shapes, options, rule, budget_ms, started - waited_ms / 1000.0, end_s)

    def decision(
        self,
        batch: int,
        length: int | None,
        options: Options | None,
        budget_ms: float | None,
        forced: str | None,
        waited_ms: float,
    ) -> Decision:
        """Which variant would answer ``batch`` texts of ``length`` tokens now; None: the longest that there is."""
        self._refuse_unmeasured(budget_ms, forced)
        room = None if options is None else room_for(self._bundle.manifest, options)
        if length is None:
            length = min(self._longest(), room or self._longest())
        check_count("batch", batch)
        check_count("length", length)
        (predictions, rungs), expected = self._predict([(batch, length)], options)
        return decide(
            predictions,
            self._members.quality,
            self._correction,
            budget_ms=budget_ms,
            waited_ms=waited_ms,
            forced=forced,
            rungs=rungs,
            expected=expected,
        )

    def forced(self, ratio: float | None, variant: str | None, rule: ExitRule | None) -> str | None:
        """The member that ``ratio`` or ``variant`` name, or the only one that ``rule`` fits; None when none is."""
        if ratio is not None and variant is not None:
            raise InputError(describe("both ratio and variant were given", expected="one of them"))
        forced = None if variant is None else self._members.known(variant)
        if ratio is not None:
            forced = self._members.of_ratio(ratio)
        if rule is not None:
            forced = self._members.with_exits(forced)
            rule.checked(len(self._members.layers[forced]))
        return forced

    def _refuse_unmeasured(self, budget_ms: float | None, forced: str | None) -> None:
        """A finite budget is only kept by measurement; with one variant there is nothing to choose."""
        if budget_ms is None or budget_ms == float("inf") or forced is not None or len(self._members.names) == 1:
            return
        if self._members.profile is None or not set(self._members.names) & set(self._members.profile.variants):
            measured = ", ".join(self._bundle.profiles()) or "none"
            hint = f"run `compexport bench {self._bundle.path}` on this machine, or name a ratio or variant"
            what = f"a budget needs a latency profile of device {self._device}"
            raise InputError(describe(what, got=f"profiles of: {measured}", hint=hint))

    def _likely(self, budget_ms: float | None, forced: str | None) -> Sequence[str]:
        """The variants that a request may be answered by: under a budget any, else one is known before.

        Of those that are as good as each other, the faster, which only the request's size tells.
        """
        if forced is not None:
            return [forced]
        if budget_ms is not None:
            return self._members.engines
        ranked = self._members.quality.ranked
        measured = self._members.profile is not None
        return [name for name, rank in (ranked if measured else ranked[:1]) if rank == ranked[0][1]]

    def _longest(self) -> int:
        if self._members.profile is not None:
            return self._members.profile.lengths[-1]
        tokenizer = self._bundle.manifest.tokenizer
        return tokenizer.max_length if tokenizer is not None else 1

    def _predict(
        self, shapes: Sequence[tuple[int, int]], options: Options | None
    ) -> tuple[Predictions, Expected | None]:
        """Predictions of chunks after each other, and, where they write text, the tokens that they are of."""
        return (self._members.predict(shapes), None) if options is None else self._writer.predict(shapes, options)
