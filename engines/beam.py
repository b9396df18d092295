"""Beam search: the likeliest texts, several followed at a time. Pure numpy.

Which ones are followed, which count and when it ends is what ``GenerationMixin._beam_search`` of transformers 5 does.
Letters: R rows still searched, N beams of each, C candidates of a row, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compexport.errors import InputError, describe
from engines.largest import largest
from engines.profile import check_count
from engines.sampling import Array, Tokens, among

Scores = npt.NDArray[np.float32]

UNLIKELY = np.float32(-1e9)  # the score of a beam that nothing should be made of


@dataclass(frozen=True, slots=True)
class Beams:
    """How many texts are followed for each that is asked for, and which of them are best.

    A text's score is the sum of its tokens' log probabilities over its number of tokens to the power of
    ``length_penalty``. ``early_stopping``: True ends a row once it has ``num_beams`` whole texts, False once its
    running ones would be worse if they ended now, "never" once nothing that they can become would be better. The
    ``num_return_sequences`` best are given.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        """Raises InputError for a value out of its range."""
        check_count("num_beams", self.num_beams)
        check_count("num_return_sequences", self.num_return_sequences)
        if not abs(self.length_penalty) < float("inf"):
            raise InputError(describe("length_penalty", got=self.length_penalty, expected="a finite number"))
        if self.early_stopping not in (True, False, "never"):
            got = repr(self.early_stopping)
            raise InputError(describe("early_stopping", got=got, expected='true, false or "never"'))


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A whole text: its new tokens, its score, and whether an end token ended it."""

    tokens: list[int]
    score: float
    ended: bool


class BeamSearch:
    """The search of one batch. ``rows`` [R]: the batch's rows that are searched still."""

    def __init__(self, beams: Beams, eos_ids: Sequence[int], prompts: Tokens, limits: Tokens) -> None:
        """``prompts`` [R, T]: what every beam of a row begins with; ``limits`` [R]: new tokens that it may get."""
        self.rows = np.arange(len(prompts))
        self.found: list[list[Hypothesis]] = [[] for _ in prompts]
        self.count = 0
        self._beams, self._eos = beams, np.array(eos_ids, np.int64)
        # Of so many, enough go on whichever of them end.
        self._candidates = max(2, 1 + len(eos_ids)) * beams.num_beams
        self._prompt_length = prompts.shape[1]
        self._limits = limits
        self._improvable = np.ones(len(prompts), bool)
        self._scores = np.full((len(prompts), beams.num_beams), UNLIKELY, np.float32)
        self._scores[:, 0] = 0.0  # at first all beams are one
        self._texts = np.repeat(prompts[:, None], beams.num_beams, axis=1)

    @property
    def history(self) -> Tokens:
        """[R · N, T], the beams of a row after each other; [R, T] at the beginning, when they are one."""
        return self._texts.reshape(-1, self._texts.shape[2]) if self.count else self._texts[:, 0]

    @property
    def length(self) -> int:
        """T."""
        return int(self._texts.shape[2])

    @property
    def owners(self) -> Tokens:
        """Which of the batch's rows each row of ``history`` belongs to."""
        return np.repeat(self.rows, self._beams.num_beams) if self.count else self.rows

    def advance(self, scores: Array, norms: Scores) -> tuple[Tokens, Tokens]:
        """Add a token to every beam, and drop rows that are done.

        Its log probability is its score, of ``scores`` [as ``history``, V], less that row's of ``norms``. Returns the
        new tokens [R · N] of rows that stay, and for each which row of ``scores`` it follows.
        """
        beams = self._beams.num_beams
        first = self.count == 0
        summed, parents, tokens = self._best(scores, norms)
        self.count += 1
        ends = among(tokens, self._eos) | (self.count >= self._limits)[:, None]
        self._collect(summed, parents, tokens, ends)
        running = summed + np.where(ends, UNLIKELY, np.float32(0.0))
        order = np.argsort(-running, axis=1, kind="stable")[:, :beams]
        self._scores = np.take_along_axis(running, order, 1)
        parents, tokens = np.take_along_axis(parents, order, 1), np.take_along_axis(tokens, order, 1)
        staying = np.flatnonzero(self._goes_on(ends))
        parents, tokens = parents[staying], tokens[staying]
        texts = np.take_along_axis(self._texts[staying], parents[:, :, None], 1)
        self._texts = np.concatenate([texts, tokens[:, :, None]], axis=2)
        self._scores, self._limits = self._scores[staying], self._limits[staying]
        self._improvable, self.rows = self._improvable[staying], self.rows[staying]
        before = np.broadcast_to(staying[:, None], parents.shape) if first else staying[:, None] * beams + parents
        return tokens.reshape(-1), before.reshape(-1)

    def stop(self) -> None:
        """End every beam where it is."""
        for at, row in enumerate(self.rows.tolist()):
            for beam in range(self._beams.num_beams):
                self._add(row, self._texts[at, beam], self._scores[at, beam], ended=False)
            self._keep_best(row)
        self.rows = self.rows[:0]

    def best(self, row: int) -> list[Hypothesis]:
        """What was asked for of a row, best first."""
        return self.found[row][: self._beams.num_return_sequences]

    def _best(self, scores: Array, norms: Scores) -> tuple[Scores, Tokens, Tokens]:
        """Of all beams' tokens the best candidates [R, C] of each row: summed log probability, beam, token."""
        rows, beams = self._scores.shape
        width = min(self._candidates, scores.shape[-1])
        tokens = np.stack([_first(one, width) for one in scores])
        values = np.take_along_axis(scores, tokens, 1) - norms[:, None]
        # What is one beam at first is the same for all.
        shape = (rows, beams, width)
        tokens = np.broadcast_to(tokens.reshape(rows, -1, width), shape).reshape(rows, -1)
        summed = (values.reshape(rows, -1, width) + self._scores[:, :, None]).reshape(rows, -1)
        order = np.argsort(-summed, axis=1, kind="stable")[:, : self._candidates]
        return np.take_along_axis(summed, order, 1), order // width, np.take_along_axis(tokens, order, 1)

    def _collect(self, scores: Scores, parents: Tokens, tokens: Tokens, ends: npt.NDArray[np.bool_]) -> None:
        """Those of the N best candidates that end are whole texts; those behind them were only there to go on."""
        changed = set()
        for at, place in np.argwhere(ends[:, : self._beams.num_beams]):
            token = tokens[at, place]
            text = np.append(self._texts[at, parents[at, place]], token)
            self._add(self.rows[at], text, scores[at, place], ended=bool((token == self._eos).any()))
            changed.add(self.rows[at])
        for row in changed:
            self._keep_best(row)

    def _add(self, row: int, text: Tokens, summed: np.float32, *, ended: bool) -> None:
        score = summed / _per_length(np.array([self.count]), self._beams.length_penalty)[0]
        if self._is_made(summed, score):
            self.found[row].append(Hypothesis(text[self._prompt_length :].tolist(), float(score), ended))

    def _keep_best(self, row: int) -> None:
        self.found[row].sort(key=lambda one: -one.score)
        del self.found[row][self._beams.num_beams :]

    def _goes_on(self, ends: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """[R]: whether a better text, or another one where more are wanted, can still come."""
        penalty = self._beams.length_penalty
        patient = self._beams.early_stopping == "never" and penalty > 0.0
        lengths = self._limits if patient else np.full(len(self.rows), self.count)
        likely = self._scores[:, 0] / _per_length(lengths, penalty)
        full = np.array([len(self.found[row]) == self._beams.num_beams for row in self.rows])
        better = np.array(self._is_made(self._scores[:, 0], likely))
        better[full] = likely[full] > np.array([self.found[row][-1].score for row in self.rows[full]], np.float32)
        self._improvable &= better
        open_ = ~full if self._beams.early_stopping is True else np.ones(len(full), bool)
        return np.asarray(self._improvable & open_ & ~ends.all(axis=1))

    def _is_made(self, summed: Any, score: Any) -> Any:
        """Whether beams are of anything: where short texts are favoured, a score may be as low for its length alone."""
        return (summed if self._beams.length_penalty < 0.0 else score) > UNLIKELY


def _per_length(lengths: Tokens, penalty: float) -> Scores:
    """What sums of log probabilities are divided by; infinity, or next to nothing, for penalties beyond reason."""
    with np.errstate(over="ignore"):
        scale = (lengths.astype(np.float64) ** penalty).astype(np.float32)
    return np.maximum(scale, np.finfo(np.float32).tiny)


def log_norms(logits: Array) -> Scores:
    """[K, V] -> [K]: what logits are more than log probabilities; not finite where one of a row is NaN or infinity."""
    # Row by row, which stays in the processor's cache.
    with np.errstate(invalid="ignore"):
        return np.array([_log_norm(row) for row in logits], np.float32)


def _log_norm(row: Array) -> np.float32:
    most = row.max()
    shifted = row - most
    return np.float32(most + np.log(np.exp(shifted, out=shifted).sum()))


def _first(row: Array, count: int) -> Tokens:
    """Places of the ``count`` largest of a row, the largest first; of equal ones the first."""
    found = largest(row, count)
    return np.asarray(found[np.argsort(-row[found], kind="stable")[:count]])
