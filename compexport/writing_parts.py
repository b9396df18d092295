"""``bench`` of variants that write: what of their work is timed alone.

Letters: B batch, S tokens read, T tokens written before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.causal import CausalGenerator
from engines.manifest import DECODER, DECODER_WITH_PAST, ENCODER, Generation
from engines.points import encoder_name, first_token_name, is_token, token_name
from engines.runtime import Runtime
from engines.seq2seq import Kept, Seq2SeqGenerator

Ids = npt.NDArray[np.int64]
Call = Callable[[], object]

BEFORE = "/before"  # ends the names of calls that are there for what comes after them, and are no rows
MANY_WRITTEN = 64  # tokens after which one more is timed, besides the second of a text


def calls_of(runtime: Runtime, ids: Ids) -> tuple[dict[str, Call], dict[str, str]]:
    """What is timed on ``ids`` [B, S], by the name of its rows; and names that have the times of another.

    Of a variant that writes on: reading S tokens, and one more token after them. Of one that reads one text and writes
    another: the encoder, the first token after it, both together, and one more token after few and after many others;
    variants that share graphs share their times too.
    """
    calls: dict[str, Call] = {}
    same: dict[str, str] = {}
    timed: dict[object, str] = {}
    for name in runtime.members.engines:
        generator = runtime.generator(name)
        ids = np.minimum(ids, generator.vocabulary - 1)  # tiny models have few
        if isinstance(generator, CausalGenerator):
            calls |= _decoder_calls(name, generator, ids)
            continue
        assert isinstance(generator, Seq2SeqGenerator)
        parts = _Parts(generator, ids)
        for part, (graphs, call) in parts.by_name(runtime.bundle.manifest.variants[name].graphs).items():
            first = timed.setdefault((part.removeprefix(name), graphs), part)
            if first == part:
                made = call()
                if is_token(part):  # steps follow each other: their weights are at hand
                    calls[f"{part}{BEFORE}"] = made
                calls[part] = made
            else:
                same[part] = first
    return calls, same


def _decoder_calls(name: str, generator: CausalGenerator, ids: Ids) -> dict[str, Call]:
    mask = np.ones_like(ids)
    _, cache = generator.read_prompt(ids, mask)
    more = partial(generator.read, ids[:, :1], mask[:, :1], cache)
    return {name: partial(generator.read_prompt, ids, mask), token_name(name): more}


def written_at(generation: Generation) -> list[int]:
    """After how many tokens one more is timed, for a model that reads one text and writes another.

    The time between grows evenly, so that two are enough; those that writing begins with count.
    """
    first = len(generation.decoder_start_ids)
    return sorted({first, max(first, min(MANY_WRITTEN, generation.positions - 1))})


class _Parts:
    """The parts of a variant that reads one text and writes another; what they need is made when it is asked for."""

    def __init__(self, generator: Seq2SeqGenerator, ids: Ids) -> None:
        self._generator = generator
        self._ids, self._mask = ids, np.ones_like(ids)
        self._prompt = np.array([generator.generation.decoder_start_ids] * len(ids), np.int64)

    def by_name(self, graphs: Mapping[str, str]) -> dict[str, tuple[tuple[str, ...], Callable[[], Call]]]:
        """The graphs that each part runs, and what makes its call."""
        name, generator = self._generator.name, self._generator
        encoder, decoder, cached = (graphs[role] for role in (ENCODER, DECODER, DECODER_WITH_PAST))
        found: dict[str, Any] = {
            name: ((encoder, decoder), lambda: self._both),
            encoder_name(name): ((encoder,), lambda: partial(generator.encode, self._ids, self._mask)),
            first_token_name(name): ((decoder,), lambda: partial(self._first, self._encoded)),
        }
        for written in written_at(generator.generation):
            found[token_name(name, written)] = ((cached,), partial(self._more, written))
        return found

    def _both(self) -> object:
        return self._first(self._generator.encode(self._ids, self._mask))

    def _first(self, encoded: Any) -> tuple[Any, Kept]:
        return self._generator.first_step(encoded, self._mask, self._prompt)

    def _more(self, written: int) -> Call:
        """One more token after so many."""
        _, kept = self._first(self._encoded)
        for _ in range(written - self._prompt.shape[1]):
            _, kept = self._generator.cached_step(self._ids[:, 0], kept)
        return partial(self._generator.cached_step, self._ids[:, 0], kept)

    @cached_property
    def _encoded(self) -> Any:
        return self._generator.encode(self._ids, self._mask)
