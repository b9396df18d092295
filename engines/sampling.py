"""Which token comes next, and when a text ends. Pure numpy, over all rows at once. Letters: B batch, V vocabulary.

A row's choice depends on its own logits and its own stream of random numbers alone: what else is in the batch changes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compexport.errors import InputError, describe
from engines.largest import largest
from engines.profile import check_count

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.int64]

EOS, LENGTH, BUDGET = "eos", "length", "budget"
USUALLY_ENOUGH = 256  # tokens to find a nucleus among; all are sorted where it is wider


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen from its logits: the likeliest one at ``temperature`` 0, else one drawn by ``seed``.

    Drawn from softmax(logits / temperature), of which only the ``top_k`` likeliest tokens stay (all for None; ties with
    the last of them stay too), and of these the fewest likeliest whose probabilities add up to ``top_p``.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for a value out of its range."""
        if not 0.0 <= self.temperature < math.inf:
            raise InputError(describe("temperature", got=self.temperature, expected="a finite number >= 0"))
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(describe("top_p", got=self.top_p, expected="a number > 0 and <= 1"))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(describe("seed", got=self.seed, expected="a whole number >= 0"))
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p < 1.0):
            got = "top_k" if self.top_k is not None else "top_p"
            raise InputError(describe("only a temperature above 0 draws tokens", got=got, expected="a temperature too"))

    @property
    def draws(self) -> bool:
        """Whether chance decides anything."""
        return self.temperature > 0.0


GREEDY = Sampling()


class Sampler:
    """One generation's choices: ``sampling``, and a stream of random numbers for each of its rows."""

    def __init__(self, sampling: Sampling, rows: Sequence[int], copies: int = 1) -> None:
        """``rows``: the number of each row in its request; rows of different numbers draw independently.

        ``copies`` of each, after each other, are rows of the batch, of which the first draws what an only one does.
        """
        self.sampling = sampling
        self._streams = []
        if sampling.draws:
            seeds = [(row, copy) if copy else (row,) for row in rows for copy in range(copies)]
            self._streams = [np.random.default_rng((sampling.seed, *seed)) for seed in seeds]

    def choose(self, logits: Array) -> Tokens:
        """[B, V] -> [B]; of equally likely tokens the first."""
        if not self.sampling.draws:
            return np.asarray(logits.argmax(axis=-1), dtype=np.int64)
        uniform = np.array([stream.random() for stream in self._streams])
        top_k = self.sampling.top_k
        if top_k is None:
            return drawn(probabilities(logits, self.sampling), uniform)
        # Of these alone, which takes a tenth of the time.
        places = [largest(row, top_k) for row in logits]
        pairs = zip(logits, places, uniform, strict=True)
        found = [at[drawn(probabilities(row[None, at], self.sampling), one[None])[0]] for row, at, one in pairs]
        return np.array(found, np.int64)

    def keep(self, rows: Tokens) -> None:
        """Go on with these rows only, numbered as in the last call."""
        if self._streams:
            self._streams = [self._streams[row] for row in rows]


def probabilities(logits: Array, sampling: Sampling) -> npt.NDArray[np.float64]:
    """[B, V] -> [B, V]: what ``sampling`` draws from, in float64; ``sampling.draws`` must be true."""
    scores = logits.astype(np.float64)
    # The likeliest is 0 before it is divided, so that however low a temperature is, it stays finite.
    with np.errstate(over="ignore"):
        scores = (scores - scores.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        lowest = np.partition(scores, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        scores = np.where(scores < lowest, -np.inf, scores)
    shares = np.exp(scores)
    shares /= shares.sum(axis=-1, keepdims=True)
    if sampling.top_p < 1.0:
        shares = _nucleus(shares, sampling.top_p)
    return np.asarray(shares)


def _nucleus(shares: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.float64]:
    """The likeliest tokens up to the one with which they add up to ``top_p``, renormalised; the others 0."""
    kept = np.zeros_like(shares)
    for row, into in zip(shares, kept, strict=True):
        order, sums = _likeliest_first(row, largest(row, USUALLY_ENOUGH))
        if sums[-1] < top_p:
            order, sums = _likeliest_first(row, np.arange(len(row)))
        needed = order[sums - row[order] < top_p]
        into[needed] = row[needed]
    return np.asarray(kept / kept.sum(axis=-1, keepdims=True))


def _likeliest_first(
    shares: npt.NDArray[np.float64], places: Tokens
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """``places``, ascending, of [V] sorted by their shares, and the sums of these so far."""
    order = places[np.argsort(-shares[places], kind="stable")]
    return order, np.cumsum(shares[order])


def drawn(shares: npt.NDArray[np.float64], uniform: npt.NDArray[np.float64]) -> Tokens:
    """Invert the distribution of every row [B, V] at ``uniform`` [B], numbers from 0 up to but without 1."""
    below = np.cumsum(shares, axis=-1)
    # Scaled by the sum, which rounding leaves beside 1, and always below it: no token without a share is ever drawn.
    total = below[:, -1]
    wanted = np.minimum(uniform * total, np.nextafter(total, 0.0))
    found = (below <= wanted[:, None]).sum(axis=-1)
    return np.asarray(found, dtype=np.int64)


def among(tokens: Tokens, ids: Sequence[int] | Tokens) -> npt.NDArray[np.bool_]:
    """Which tokens are one of a few ``ids``: ``np.isin``, at a fifth of its time for so few."""
    return np.asarray((tokens[..., None] == np.asarray(ids, np.int64)).any(axis=-1))


@dataclass(frozen=True, slots=True)
class Stop:
    """When a row ends: at one of ``eos_ids``, which is its last token, or after ``max_new_tokens``,

    or where it has, with its prompt, ``max_length`` tokens.
    """

    eos_ids: tuple[int, ...]
    max_new_tokens: int
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a length below 1."""
        check_count("max_new_tokens", self.max_new_tokens)

    def limits(self, lengths: Tokens, max_positions: int) -> Tokens:
        """How many tokens each row may get, [B]: prompts have ``lengths`` [B], and a model so many positions.

        The last token needs no position of its own, as nothing is read after it.
        """
        most = min(self.max_new_tokens, max_positions)
        longest = max_positions + 1 if self.max_length is None else min(max_positions + 1, self.max_length)
        return np.asarray(np.minimum(most, longest - lengths), dtype=np.int64)

    def ends(self, tokens: Tokens, count: int, limits: Tokens) -> list[str | None]:
        """Why each row ends with its ``count``-th token, of ``tokens`` [B]; None where it goes on."""
        at_eos = among(tokens, self.eos_ids)
        return [EOS if eos else LENGTH if full else None for eos, full in zip(at_eos, count >= limits, strict=True)]
