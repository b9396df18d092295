"""Writing text: token after token, each with one run over what is kept of those before it.

One loop for models that write a text on (``engines.causal``) and for those that read one and write another
(``engines.seq2seq``). What is kept, keys and values, stays in the backend's memory from run to run. Letters: B rows of
a request, K rows still in the batch, S tokens of one run, T tokens so far, N beams, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from compexport.errors import CompexportError, InputError, describe
from engines.answers import not_finite
from engines.beam import BeamSearch, Hypothesis, log_norms
from engines.logit_rules import Ruling
from engines.manifest import Generation
from engines.options import Options, options_for
from engines.sampling import BUDGET, EOS, LENGTH, Array, Sampler, Stop, Tokens

IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"

State = Any  # what a kind of model keeps of what it has read
Ends = tuple[Stop, Tokens, Ruling | None]


@dataclass(frozen=True, slots=True)
class StepDeadline:
    """Until when a generation must be over, and what each of its steps takes.

    ``at_s`` is a time of ``clock`` (seconds); ``step_ms(rows, past)`` the time to expect of a step of so many rows
    over so many tokens kept.
    """

    at_s: float
    step_ms: Callable[[int, int], float]
    clock: Callable[[], float] = perf_counter

    def allows(self, rows: int, past: int) -> bool:
        """Whether a step that starts now would end in time."""
        return self.clock() * 1000.0 + self.step_ms(rows, past) <= self.at_s * 1000.0


@dataclass(frozen=True, slots=True)
class Token:
    """A new token of one row of the request; ``why`` ("eos", "length" or "budget") when it is the row's last."""

    row: int
    id: int
    why: str | None


@dataclass(frozen=True, slots=True)
class Generated:
    """All new tokens of a row, an end token included, and why there are no more.

    ``score``: of a text that was searched for with beams, as ``Beams`` says; ``others``: the next best ones, or more
    texts that were drawn, where several were asked for; fewer where rules leave no more. ``steps``: how many tokens
    long the beams were when the search ended, which may be more than the best text has.
    """

    tokens: list[int]
    why: str
    score: float | None = None
    others: tuple[Generated, ...] = ()
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """A batch whose first tokens can be chosen.

    ``last`` [B, V]: logits after what was read; ``history`` [B, T]: what a text begins with, -1 where a row has no
    token; ``sources``: what each row is written from, without padding; ``state``: what is kept.
    """

    last: Array
    history: Tokens
    sources: list[Tokens]
    state: State


class Generator(ABC):
    """A variant that writes, open. Threads may share it; what it keeps belongs to one generation at a time."""

    def __init__(self, name: str, generation: Generation, vocabulary: int) -> None:
        self.name = name
        self.generation = generation
        self.vocabulary = vocabulary

    def stream(
        self,
        ids: Tokens,
        mask: Tokens,
        *,
        options: Options | None = None,
        rows: Sequence[int] | None = None,
        deadline: StepDeadline | None = None,
    ) -> Iterator[Token]:
        """New tokens as they come: one of every row, then the next of every row that goes on.

        ``ids`` and ``mask`` [B, S]: a batch as this kind of model reads it. ``options``: the model's own by default.
        ``rows`` [B]: their numbers in the request, by which each draws its own random numbers; from 0 by default. At
        least one token of every row comes, whatever the ``deadline``, which is looked at before a token is given.

        Raises InputError, before the first token, for what is no batch and for options that cannot be, CompexportError
        for logits that are not finite.
        """
        how = self._options(options)
        if how.beams.num_beams > 1 or how.beams.num_return_sequences > 1:
            hint = "generate with one beam, or without streaming"
            raise InputError(
                describe(f"{self.name}: several texts at a time come whole, not token by token", hint=hint)
            )
        numbers = self._numbers(ids, mask, rows)
        begun = self._begin(ids, mask, how)
        return self._written(begun, Sampler(how.sampling, numbers), self._ends(begun, how), deadline)

    def generate(
        self,
        ids: Tokens,
        mask: Tokens,
        *,
        options: Options | None = None,
        rows: Sequence[int] | None = None,
        deadline: StepDeadline | None = None,
    ) -> list[Generated]:
        """``stream``, gathered, one entry per row; and what does not stream: beams, and several texts of a row."""
        how = self._options(options)
        numbers = self._numbers(ids, mask, rows)
        begun = self._begin(ids, mask, how)
        if how.beams.num_beams > 1:
            return self._searched(begun, how, deadline)
        copies = how.beams.num_return_sequences
        sampler = Sampler(how.sampling, numbers, copies)
        begun = self._copied(begun, copies)
        tokens: list[list[int]] = [[] for _ in range(copies * len(ids))]
        whys = [""] * len(tokens)
        for token in self._written(begun, sampler, self._ends(begun, how), deadline):
            tokens[token.row].append(token.id)
            whys[token.row] = token.why or ""
        found = [Generated(*pair) for pair in zip(tokens, whys, strict=True)]
        return [_together(found[start : start + copies]) for start in range(0, len(found), copies)]

    @abstractmethod
    def warm_up(self, shortest: int = 1) -> None:
        """Write a little, so that the next generation is as fast as later ones; ``shortest``: tokens of a text."""

    @abstractmethod
    def _begin(self, ids: Tokens, mask: Tokens, options: Options) -> Begun:
        """Read a batch, which ``_require_batch`` has seen."""

    @abstractmethod
    def _step(self, tokens: Tokens, going: npt.NDArray[np.bool_], state: State) -> tuple[Array, State]:
        """Read ``tokens`` [K], of which only those of rows that are ``going`` count: logits [K, V], what is kept."""

    @abstractmethod
    def _take(self, state: State, rows: Tokens) -> State:
        """These rows, in this order, of what is kept."""

    @abstractmethod
    def _require_batch(self, ids: Tokens, mask: Tokens) -> None:
        """InputError unless this is a batch as this kind of model reads it."""

    def _options(self, options: Options | None) -> Options:
        how = options_for(self.generation) if options is None else options
        how.rules.require_known(self.name, self.vocabulary)
        return how

    def _numbers(self, ids: Tokens, mask: Tokens, rows: Sequence[int] | None) -> Sequence[int]:
        if ids.ndim != 2 or not len(ids) or mask.shape != ids.shape or any(a.dtype != np.int64 for a in (ids, mask)):
            got = f"ids {ids.dtype}{list(ids.shape)} and mask {mask.dtype}{list(mask.shape)}"
            raise InputError(describe(f"{self.name}: prompts", got=got, expected="both int64[batch, sequence]"))
        if not mask.any(axis=1).all():
            raise InputError(describe(f"{self.name}: an empty prompt", expected="at least one token in every row"))
        self._require_batch(ids, mask)
        if rows is not None and len(rows) != len(ids):
            raise InputError(describe(f"{self.name}: numbers of rows", got=len(rows), expected=len(ids)))
        return range(len(ids)) if rows is None else rows

    def _written(self, begun: Begun, sampler: Sampler, ends: Ends, deadline: StepDeadline | None) -> Iterator[Token]:
        """The loop: choose by the last logits [K, V], say so, read what was chosen."""
        last, history, state = begun.last, begun.history, begun.state
        stop, limits, ruling = ends
        inside = np.arange(len(last))  # the request's rows that are in the batch
        going = np.ones(len(last), bool)  # and of these, which are not at their end
        for count in range(1, int(limits.max()) + 1):
            self._require_finite(last, inside, going)
            if ruling is not None:
                last = ruling.apply(last, history, inside, count - 1)
                self._require_choice(last, going)
            tokens = np.where(going, sampler.choose(last), self.generation.pad_id)
            whys = stop.ends(tokens, count, limits[inside])
            on = going & np.array([why is None for why in whys])
            # Copying what is kept costs about as much as a run does: not for every row that ends.
            staying = np.flatnonzero(on) if 2 * on.sum() <= len(on) else np.arange(len(on))
            late = bool(on.any()) and deadline is not None and not deadline.allows(len(staying), history.shape[1])
            for at in np.flatnonzero(going):
                yield Token(int(inside[at]), int(tokens[at]), BUDGET if late and on[at] else whys[at])
            if late or not on.any():
                return
            history = np.concatenate([history, tokens[:, None]], axis=1)
            going = on
            if len(staying) < len(inside):
                inside, tokens, going, history = inside[staying], tokens[staying], on[staying], history[staying]
                state = self._take(state, staying)
                sampler.keep(staying)
            last, state = self._step(tokens, going, state)

    def _searched(self, begun: Begun, options: Options, deadline: StepDeadline | None) -> list[Generated]:
        """The loop with beams, which are one until the first tokens are chosen."""
        last, state = begun.last, begun.state
        _, limits, ruling = self._ends(begun, options)
        search = BeamSearch(options.beams, self.generation.eos_ids, begun.history, limits)
        steps = np.zeros(len(limits), np.int64)
        while True:
            norms = log_norms(last)
            if not np.isfinite(norms).all():
                raise self._not_finite(search.owners[~np.isfinite(norms)])
            if ruling is not None:  # which act on log probabilities
                last = ruling.apply(last - norms[:, None], search.history, search.owners, search.count)
                self._require_choice(last, np.ones(len(last), bool))
                norms = np.zeros_like(norms)
            steps[search.rows] += 1
            tokens, parents = search.advance(last, norms)
            if not len(tokens) or (deadline is not None and not deadline.allows(len(tokens), search.length - 1)):
                break
            state = self._take(state, parents)
            last, state = self._step(tokens, np.ones(len(tokens), bool), state)
        unfinished = set(search.rows.tolist())
        search.stop()
        found = [[_hypothesis(one, row in unfinished) for one in search.best(row)] for row in range(len(limits))]
        return [replace(_together(texts), steps=count) for texts, count in zip(found, steps.tolist(), strict=True)]

    def _ends(self, begun: Begun, options: Options) -> Ends:
        """When texts end: the rule, the limits [B], and what else holds."""
        lengths = (begun.history >= 0).sum(axis=1)
        stop = Stop(tuple(self.generation.eos_ids), options.max_new_tokens, options.max_length)
        limits = stop.limits(lengths, self.generation.positions)
        if limits.min() < 1:
            row = int(limits.argmin())
            got = f"{lengths[row]} tokens in row {row}"
            expected = f"fewer than {options.max_length}, the max_length"
            raise InputError(describe(f"{self.name}: the prompt leaves no room", got=got, expected=expected))
        if not options.rules.hold:
            return stop, limits, None
        return stop, limits, Ruling(options.rules, stop.eos_ids, lengths, limits, begun.sources)

    def _copied(self, begun: Begun, copies: int) -> Begun:
        if copies == 1:
            return begun
        rows = np.repeat(np.arange(len(begun.last)), copies)
        sources = [begun.sources[row] for row in rows]
        return Begun(begun.last[rows], begun.history[rows], sources, self._take(begun.state, rows))

    def _require_finite(self, last: Array, inside: Tokens, going: npt.NDArray[np.bool_]) -> None:
        """What a row that is at its end reads is padding, and what follows from that nobody asked."""
        broken = going & ~np.isfinite(last).all(axis=1)
        if broken.any():
            raise self._not_finite(inside[broken])

    def _not_finite(self, rows: Tokens) -> CompexportError:
        return not_finite(
            f"{self.name}: logits hold", got=f"row {', '.join(map(str, dict.fromkeys(rows[:5].tolist())))}"
        )

    def _require_choice(self, scores: Array, going: npt.NDArray[np.bool_]) -> None:
        if np.isneginf(scores[going].max(axis=1)).any():
            hint = "loosen no_repeat_ngram_size, bad_words_ids, suppress_tokens or the smallest length"
            raise InputError(
                describe(f"{self.name}: the rules of this generation leave no token to go on with", hint=hint)
            )


def _hypothesis(one: Hypothesis, stopped: bool) -> Generated:
    """``stopped``: its row was still searched at the end."""
    return Generated(one.tokens, EOS if one.ended else BUDGET if stopped else LENGTH, one.score)


def _together(texts: Sequence[Generated]) -> Generated:
    """The first of the texts of a row, with the others."""
    return replace(texts[0], others=tuple(texts[1:]))
