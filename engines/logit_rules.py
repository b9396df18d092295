"""Rules on what may come next, which no model knows of: repeated tokens and n-grams, banned and forced ones.

What each does, and their order, is what the ``LogitsProcessor`` classes of transformers 5 do to the same settings.
Pure numpy. Letters: B rows of a request, K rows still in the batch (beams of one row are rows of their own), T tokens
so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from compexport.errors import InputError, describe
from engines.sampling import Array, Tokens

NOTHING = -1  # stands in a history where a row has no token


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True, slots=True)
class Rules:
    """Settings by the names of ``generation_config.json``; by default none holds.

    ``repetition_penalty`` makes what is there already less likely, above 1. No n-gram of ``no_repeat_ngram_size`` comes
    twice, none of ``encoder_no_repeat_ngram_size`` that the source holds. ``bad_words_ids`` are sequences that never
    come, ``suppress_tokens`` tokens, ``begin_suppress_tokens`` tokens that are not the first. A text does not end
    before it has ``min_length`` tokens, those of its prompt among them, and ``min_new_tokens`` new ones.
    ``forced_bos_id`` follows a prompt of one token, ``forced_eos_id`` is the last token that the length allows.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos_id: int | None = None
    forced_eos_id: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a value out of its range."""
        if not 0.0 < self.repetition_penalty < float("inf"):
            expected = "a finite number > 0"
            raise InputError(describe("repetition_penalty", got=self.repetition_penalty, expected=expected))
        for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"):
            if not _is_count(getattr(self, name)):
                raise InputError(describe(name, got=getattr(self, name), expected="a whole number >= 0"))
        if not all(self.bad_words_ids):
            raise InputError(describe("bad_words_ids", got="an empty word", expected="at least one token in each"))
        for name, ids in self._tokens():
            if not all(_is_count(one) for one in ids):
                raise InputError(describe(name, got=list(ids), expected="ids of tokens, whole numbers >= 0"))

    @property
    def hold(self) -> bool:
        """Whether there are any."""
        return any(getattr(self, field.name) != field.default for field in fields(self))

    def require_known(self, name: str, vocabulary: int) -> None:
        """InputError for tokens that a model of so many does not have; ``name`` is the model's."""
        for what, ids in self._tokens():
            if ids and max(ids) >= vocabulary:
                expected = f"ids from 0 to {vocabulary - 1}"
                raise InputError(describe(f"{name}: {what}", got=max(ids), expected=expected))

    def _tokens(self) -> list[tuple[str, tuple[int, ...]]]:
        named = [("bad_words_ids", tuple(token for word in self.bad_words_ids for token in word))]
        named += [(name, getattr(self, name)) for name in ("suppress_tokens", "begin_suppress_tokens")]
        single = [(name, getattr(self, name)) for name in ("forced_bos_id", "forced_eos_id")]
        return named + [(name, () if one is None else (one,)) for name, one in single]


NO_RULES = Rules()


class Ruling:
    """The rules of one generation."""

    def __init__(
        self, rules: Rules, eos_ids: Sequence[int], lengths: Tokens, limits: Tokens, sources: Sequence[Tokens]
    ) -> None:
        """``lengths`` and ``limits`` [B]: tokens that each row's prompt has, and new ones that it may get.

        ``sources``: what each row is written from, without padding.
        """
        self._rules = rules
        self._eos = np.array(eos_ids, np.int64)
        self._lengths, self._limits = lengths, limits
        # Ends are for min_length to ban: a word of nothing but one is none.
        words = [word for word in rules.bad_words_ids if len(word) > 1 or word[0] not in eos_ids]
        self._bad = np.array([word[0] for word in words if len(word) == 1], np.int64)
        self._suppressed = np.array(rules.suppress_tokens, np.int64)
        self._bad_words = [np.array(word, np.int64) for word in words if len(word) > 1]
        size = rules.encoder_no_repeat_ngram_size
        self._source_ngrams = [_continuations(source, size) for source in sources] if size else []

    def apply(self, scores: Array, history: Tokens, rows: Tokens, count: int) -> Array:
        """``scores`` [K, V] under the rules, in an array of its own; what must not come is at minus infinity.

        ``history`` [K, T]: what each has so far, its prompt first, and ``NOTHING`` where there is no token. ``rows``
        [K]: whose these are. ``count``: new tokens so far.
        """
        scores = scores.copy()
        if self._rules.repetition_penalty != 1.0:
            _penalise(scores, history, self._rules.repetition_penalty)
        if self._rules.no_repeat_ngram_size:
            _ban_repeated(scores, history, self._rules.no_repeat_ngram_size)
        if self._rules.encoder_no_repeat_ngram_size:
            self._ban_of_source(scores, history, rows)
        scores[:, self._bad] = -np.inf
        for word in self._bad_words:
            _ban_last(scores, history, word)
        self._ban_ends(scores, rows, count)
        self._force(scores, history.shape[1], rows, count)
        scores[:, self._suppressed] = -np.inf
        self._ban_at_the_beginning(scores, history.shape[1], count)
        return scores

    def _ban_of_source(self, scores: Array, history: Tokens, rows: Tokens) -> None:
        before = self._rules.encoder_no_repeat_ngram_size - 1
        if history.shape[1] < before:
            return
        for at, row in enumerate(rows):
            latest = tuple(history[at, history.shape[1] - before :].tolist())
            scores[at, self._source_ngrams[row].get(latest, [])] = -np.inf

    def _ban_ends(self, scores: Array, rows: Tokens, count: int) -> None:
        early = np.full(len(rows), count < self._rules.min_new_tokens)
        if self._rules.min_length:
            early |= self._lengths[rows] + count < self._rules.min_length
        if early.any():
            scores[np.ix_(early, self._eos)] = -np.inf

    def _force(self, scores: Array, length: int, rows: Tokens, count: int) -> None:
        if self._rules.forced_bos_id is not None and length == 1:
            scores[:] = -np.inf
            scores[:, self._rules.forced_bos_id] = 0.0
        if self._rules.forced_eos_id is not None:
            last = self._limits[rows] == count + 1
            scores[last] = -np.inf
            scores[last, self._rules.forced_eos_id] = 0.0

    def _ban_at_the_beginning(self, scores: Array, length: int, count: int) -> None:
        """After a forced token the text begins one later."""
        forced = self._rules.forced_bos_id is not None and length - count == 1
        if self._rules.begin_suppress_tokens and count == int(forced):
            scores[:, list(self._rules.begin_suppress_tokens)] = -np.inf


def _penalise(scores: Array, history: Tokens, penalty: float) -> None:
    rows, places = np.nonzero((history != NOTHING) & (history < scores.shape[1]))
    tokens = history[rows, places]
    found = scores[rows, tokens]
    scores[rows, tokens] = np.where(found < 0, found * penalty, found / penalty)


def _ban_repeated(scores: Array, history: Tokens, size: int) -> None:
    """A token that would complete an n-gram of ``size`` that is there already."""
    length = history.shape[1]
    if length < size:
        return
    windows = np.lib.stride_tricks.sliding_window_view(history, size, axis=1)
    latest = history[:, None, length + 1 - size :]
    same = (windows[..., :-1] == latest).all(axis=-1)
    rows, places = np.nonzero(same & (windows[..., -1] != NOTHING) & (windows[..., -1] < scores.shape[1]))
    scores[rows, windows[rows, places, -1]] = -np.inf


def _ban_last(scores: Array, history: Tokens, word: Tokens) -> None:
    """The last token of ``word``, where its others have just come."""
    before = len(word) - 1
    if history.shape[1] >= before:
        scores[(history[:, -before:] == word[:-1]).all(axis=1), word[-1]] = -np.inf


def _continuations(source: Tokens, size: int) -> dict[tuple[int, ...], list[int]]:
    """What follows every ``size - 1`` tokens of ``source``."""
    found: dict[tuple[int, ...], list[int]] = {}
    tokens = source.tolist()
    for start in range(len(tokens) - size + 1):
        *before, last = tokens[start : start + size]
        found.setdefault(tuple(before), []).append(last)
    return found
