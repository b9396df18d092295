"""A text as it is written, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from engines.answers import Answer
from engines.generate import Token
from engines.results import BatchResult, Result
from engines.text import TextEncoder

_UNFINISHED = "\ufffd"  # what stands for bytes that are no character yet


class Stream:
    """Iterate over it once for the pieces; ``result`` is there after the last."""

    def __init__(self, tokens: Iterator[Token], encoder: TextEncoder, finish: Callable[[Answer], BatchResult]) -> None:
        """``tokens``: of one text, in order; ``finish`` makes the result of the whole answer."""
        self._tokens = tokens
        self._encoder = encoder
        self._finish = finish
        self.batch: BatchResult | None = None

    def __iter__(self) -> Iterator[str]:
        ids: list[int] = []
        shown, text, why = "", "", ""
        for token in self._tokens:
            ids.append(token.id)
            text, why = self._encoder.decode(ids), token.why or why
            # A character of several tokens comes with the last of them.
            if text.startswith(shown) and len(text) > len(shown) and (token.why or not text.endswith(_UNFINISHED)):
                yield text[len(shown) :]
                shown = text
        self.batch = self._finish({"text": text, "tokens": ids, "why": why})

    @property
    def result(self) -> Result | None:
        """What a request that is not streamed gives; None before the end."""
        return None if self.batch is None else self.batch.results()[0]
