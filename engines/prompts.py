"""Templates around texts, for models that answer in words: ``"review: {text} It was <extra_id_0>"``.

A text that is too long is cut inside its place in the template, so that what the template says after it is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compexport.errors import InputError, describe
from engines.manifest import TEXT, TEXT_PAIR

_PLACES = re.compile(r"\{text\}|\{text_pair\}")


@dataclass(frozen=True)
class Prompted:
    """A filled template as tokens. ``encoding``: a ``tokenizers.Encoding``; ``truncated``: some text was cut.

    ``visible``: every text left at least one token.
    """

    encoding: Any
    truncated: bool
    visible: bool


@dataclass(frozen=True)
class Prompt:
    """A template with one ``{text}`` and at most one ``{text_pair}``, as :class:`LabelWords` checks it."""

    template: str

    @property
    def reads_pairs(self) -> bool:
        """Whether there is a place for a second text."""
        return TEXT_PAIR in self.template

    def fill(self, text: str, pair: str | None = None) -> tuple[str, list[tuple[int, int]]]:
        """The whole prompt, and where in it the text and, if there is a place for it, the pair stand."""
        values = {TEXT: text, TEXT_PAIR: pair or ""}
        filled, end = "", 0
        spans = {}
        for place in _PLACES.finditer(self.template):
            filled += self.template[end : place.start()]
            spans[place.group()] = (len(filled), len(filled) + len(values[place.group()]))
            filled += values[place.group()]
            end = place.end()
        return filled + self.template[end:], [spans[key] for key in (TEXT, TEXT_PAIR) if key in spans]

    def encode(self, tokenizer: Any, items: Sequence[tuple[str, str | None]], max_length: int) -> list[Prompted]:
        """Tokenise filled templates, each cut to ``max_length`` tokens, special ones included.

        ``tokenizer`` is a ``tokenizers.Tokenizer`` that neither pads nor truncates. The longer of two texts is cut
        first. Raises InputError when the template alone is longer.
        """
        filled = [self.fill(*item) for item in items]
        encodings = tokenizer.encode_batch([text for text, _ in filled])
        return [
            self._fitted(tokenizer, item, encoding, spans, max_length)
            for item, encoding, (_, spans) in zip(items, encodings, filled, strict=True)
        ]

    def _fitted(
        self,
        tokenizer: Any,
        item: tuple[str, str | None],
        encoding: Any,
        spans: list[tuple[int, int]],
        max_length: int,
    ) -> Prompted:
        tokens = [_inside(encoding, span) for span in spans]
        visible = all(tokens)
        cut = len(encoding) > max_length
        texts = list(item)
        # Cutting a word changes its tokens, rarely into more of them: then the next round cuts further.
        while len(encoding) > max_length:
            if not any(tokens):
                what, got = f"the template {self.template!r} alone is too long", f"{len(encoding)} tokens"
                raise InputError(
                    describe(what, got=got, expected=f"at most {max_length}", hint="allow more with --max-length")
                )
            keep = _shares([len(one) for one in tokens], len(encoding) - max_length)
            for which, (one, count) in enumerate(zip(tokens, keep, strict=True)):
                if count < len(one):
                    texts[which] = (texts[which] or "")[: max(0, encoding.offsets[one[count]][0] - spans[which][0])]
            filled, spans = self.fill(texts[0] or "", texts[1])
            encoding = tokenizer.encode(filled)
            tokens = [_inside(encoding, span) for span in spans]
        return Prompted(encoding, cut, visible)


def _inside(encoding: Any, span: tuple[int, int]) -> list[int]:
    """Positions of the tokens that stand for some of the characters from span[0] up to span[1]."""
    return [
        position for position, (start, end) in enumerate(encoding.offsets) if max(start, span[0]) < min(end, span[1])
    ]


def _shares(lengths: list[int], excess: int) -> list[int]:
    """How many tokens each text may keep so that ``excess`` go in all, the longest first; none falls below zero."""
    kept = list(lengths)
    for _ in range(min(excess, sum(lengths))):
        kept[kept.index(max(kept))] -= 1
    return kept
