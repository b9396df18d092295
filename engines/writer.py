"""The part of a runtime that writes: how long that should take, until when it may, and what it took.

Letters: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter

from engines.answers import Answer
from engines.anytime import Anytime
from engines.generate import Generated, StepDeadline, Token
from engines.lengths import Expected, longest
from engines.manifest import Manifest
from engines.members import Members, Predictions
from engines.opening import Opening
from engines.options import Options
from engines.requests import Request
from engines.results import BatchResult
from engines.streaming import Stream
from engines.writing import most_tokens, rows_per_text, written_answers


class Writer:
    """Of one bundle that writes text. Threads may share it."""

    def __init__(self, manifest: Manifest, members: Members, opening: Opening, anytime: Anytime) -> None:
        self._manifest = manifest
        self._members = members
        self._opening = opening
        self._anytime = anytime

    def predict(self, shapes: Sequence[tuple[int, int]], options: Options) -> tuple[Predictions, Expected]:
        """Predictions of chunks [B, S] after each other, and the tokens of the longest text that they are of."""
        expected = [self._expected(shape, options) for shape in shapes]
        times = self._members.writing_times
        found = {} if times is None else times.writing(shapes, expected, rows_per_text(options))
        return (found, {}), longest(expected)

    def write(self, request: Request, number: int) -> list[Answer]:
        """Text for each of a chunk. What was written, not what was expected, is compared with its prediction."""
        options, encoder, rows = request.options, self._opening.encoder(), request.chunks[number]
        generator = self._opening.generators([request.engine])[request.engine]
        feeds = encoder.feeds(request.texts_of(number))
        deadline = self._deadline(request, number)
        started = perf_counter()
        written = generator.generate(
            feeds["input_ids"], feeds["attention_mask"], options=options, rows=rows, deadline=deadline
        )
        ended = perf_counter()
        self._observe(request, number, written, (ended - started) * 1000.0)
        found = written_answers(encoder, written)
        self._anytime.aftercare.observe(len(rows), (perf_counter() - ended) * 1000.0)
        return found

    def stream(self, request: Request, finish: Callable[[Answer], BatchResult]) -> Stream:
        """The only text of a request, as it is written; ``finish`` makes the result of the whole answer.

        Like other texts it is compared with its prediction, without what whoever reads it does between its tokens.
        """
        encoder = self._opening.encoder()
        generator = self._opening.generators([request.engine])[request.engine]
        feeds, deadline = encoder.feeds(request.encoded), self._deadline(request, 0)
        started = perf_counter()
        tokens = generator.stream(
            feeds["input_ids"], feeds["attention_mask"], options=request.options, deadline=deadline
        )
        return Stream(self._observed(request, tokens, perf_counter() - started), encoder, finish)

    def _observed(self, request: Request, tokens: Iterator[Token], taken_s: float) -> Iterator[Token]:
        """``tokens`` as they come; once all are there, what they took is told. ``taken_s``: before the first."""
        written: list[Token] = []
        while True:
            started = perf_counter()
            token = next(tokens, None)
            taken_s += perf_counter() - started
            if token is None:
                break
            written.append(token)
            yield token
        if written:
            text = Generated([token.id for token in written], written[-1].why or "")
            self._observe(request, 0, [text], taken_s * 1000.0)

    def _expected(self, shape: tuple[int, int], options: Options) -> Expected:
        """How many tokens the longest text of a chunk will have."""
        batch, length = shape
        most, lengths = most_tokens(self._manifest, options, length), self._members.output_lengths
        found = Expected.at_most(most)
        if lengths is not None:
            found = lengths.expected(batch, length, most)
            if lengths.num_beams != options.beams.num_beams:
                found = replace(found, counted_with=lengths.num_beams)
        return found.at_least(min(most, options.rules.min_new_tokens))

    def _deadline(self, request: Request, number: int) -> StepDeadline | None:
        """Until when chunk ``number`` must be written; None when nothing must be kept."""
        if request.end_s is None:
            return None
        assert request.options is not None
        times, engine, shapes = self._members.writing_times, request.engine, request.shapes[number:]
        if times is None or not times.knows(engine):
            return self._anytime.own_pace(request.end_s, shapes)
        rows = rows_per_text(request.options)
        whole = [times.writing([shape], [self._expected(shape, request.options)], rows)[engine] for shape in shapes]
        return self._anytime.step_deadline(engine, request.end_s, times, shapes, whole)

    def _observe(self, request: Request, number: int, written: Sequence[Generated], engine_ms: float) -> None:
        times, engine, options = self._members.writing_times, request.engine, request.options
        assert options is not None
        if times is None or not times.knows(engine):
            return
        if options.beams.num_beams > 1:  # whose search may go on beyond what it found
            tokens = [one.steps or 1 for one in written]
        else:
            tokens = [len(text.tokens) for one in written for text in (one, *one.others)]
        count = Expected.at_most(max(tokens))
        expected = times.writing([request.shapes[number]], [count], rows_per_text(options))[engine]
        # Texts that end early leave the batch: then the prediction is a bound, as it is outside the grid.
        bound = expected.extrapolated or min(tokens) < max(tokens)
        self._anytime.observe(engine, replace(expected, extrapolated=bound), engine_ms)
