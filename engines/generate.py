"""Writing text on: a prompt is read once, then token after token, each with one run over what is kept of the past.

What is kept, keys and values of every step of the model, stays in the backend's memory from run to run. Letters: B rows
of a request, K rows still in the batch, S tokens of one run, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compexport.errors import BundleError, InputError, describe
from engines.answers import not_finite
from engines.manifest import PAST, PRESENT, Generation, TensorSpec
from engines.sampling import GREEDY, Array, Sampler, Sampling, Stop, Tokens
from engines.session import GatheringSession, Held

IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
MAX_NEW_TOKENS = 32
WARM_UP_TOKENS = 4
ROOM_BYTES = 1 << 28  # for the logits of one run, which are of all positions where only the last counts


@dataclass(frozen=True, slots=True)
class Cache:
    """What a decoder has read. ``variant``: whose states they are; ``mask`` [B, T]: which positions hold a token."""

    variant: str
    mask: Tokens
    held: Mapping[str, Held]


@dataclass(frozen=True, slots=True)
class Token:
    """A new token of one row of the request; ``why`` ("eos" or "length") when it is the row's last."""

    row: int
    id: int
    why: str | None


@dataclass(frozen=True, slots=True)
class Generated:
    """All new tokens of a row, an end token included, and why there are no more."""

    tokens: list[int]
    why: str


class Generator:
    """One open decoder. Threads may share it; a ``Cache`` belongs to one generation at a time."""

    def __init__(self, name: str, session: GatheringSession, generation: Generation) -> None:
        """``name``: the variant's. The session belongs to the caller.

        Raises BundleError for a graph that cannot write.
        """
        if fault := _fault(session, generation):
            what = f"{name}: its graph is no decoder, or not this bundle's"
            raise BundleError(describe(what, got=fault, hint="build the bundle again"))
        self.name = name
        self.generation = generation
        self.vocabulary = _size(next(spec for spec in session.outputs if spec.name == LOGITS).shape[-1])
        self._session = session
        self._fed = {spec.name for spec in session.inputs}
        self._pasts = [spec for spec in session.inputs if spec.name.startswith(f"{PAST}.")]
        self._presents = {spec.name: spec.name.replace(PAST, PRESENT, 1) for spec in self._pasts}

    def read(self, ids: Tokens, mask: Tokens, cache: Cache | None = None) -> tuple[Array, Cache]:
        """Read ``ids`` [B, S] after what is in ``cache``: logits [B, S, V], and the cache with them.

        ``mask`` [B, S] is 0 where there is no token; a prompt is padded on the left. Raises InputError for a cache of
        another variant or number of rows, or more tokens than the model has positions.
        """
        feeds: dict[str, Array] = {}
        if cache is None:
            cache, feeds = Cache(self.name, np.zeros((len(ids), 0), np.int64), {}), self._nothing(len(ids))
        elif cache.variant != self.name:
            what = f"this cache holds the states of {cache.variant}, and {self.name} has other steps"
            raise InputError(describe(what, hint="finish a generation with the variant that began it"))
        elif len(cache.mask) != len(ids):
            raise InputError(describe(f"{self.name}: rows", got=len(ids), expected=f"{len(cache.mask)}, as cached"))
        whole = np.concatenate([cache.mask, mask], axis=1)
        longest, limit = int(whole.sum(axis=1).max()), self.generation.positions
        if longest > limit:
            raise InputError(describe(f"{self.name}: tokens", got=longest, expected=f"at most {limit}"))
        positions = np.maximum(whole.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        made = {IDS: ids, MASK: whole, POSITIONS: positions}
        feeds |= {name: array for name, array in made.items() if name in self._fed}
        outputs, held = self._session.run_held(feeds, cache.held, (LOGITS,), list(self._presents.values()))
        return outputs[LOGITS], Cache(self.name, whole, {past: held[now] for past, now in self._presents.items()})

    def read_prompt(self, ids: Tokens, mask: Tokens) -> tuple[Array, Cache]:
        """Read prompts [B, S], padded on the left: logits [B, V] after their last token, and the cache with them.

        In pieces, where the logits of all positions would take too much memory. Errors as ``read``.
        """
        piece = max(1, ROOM_BYTES // (4 * len(ids) * self.vocabulary))
        logits, cache = self.read(ids[:, :piece], mask[:, :piece])
        for start in range(piece, ids.shape[1], piece):
            logits, cache = self.read(ids[:, start : start + piece], mask[:, start : start + piece], cache)
        return logits[:, -1], cache

    def stream(
        self,
        ids: Tokens,
        mask: Tokens,
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = MAX_NEW_TOKENS,
        rows: Sequence[int] | None = None,
    ) -> Iterator[Token]:
        """New tokens as they come: one of every row, then the next of every row that goes on.

        ``ids`` and ``mask`` [B, S]: prompts, padded on the left. ``rows`` [B]: their numbers in the request, by which
        each draws its own random numbers; from 0 by default. Raises InputError, before the first token, as ``read``
        does and for what is no batch of prompts, CompexportError for logits that are not finite.
        """
        stop = Stop(tuple(self.generation.eos_ids), max_new_tokens)
        numbers = range(len(ids)) if rows is None else rows
        self._require_prompts(ids, mask, numbers)
        sampler = Sampler(sampling, numbers)
        limits = stop.limits(mask.sum(axis=1), self.generation.positions)
        last, cache = self.read_prompt(ids, mask)
        return self._written(last, cache, sampler, stop, limits)

    def generate(
        self,
        ids: Tokens,
        mask: Tokens,
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = MAX_NEW_TOKENS,
        rows: Sequence[int] | None = None,
    ) -> list[Generated]:
        """``stream``, gathered: one entry per row."""
        tokens: list[list[int]] = [[] for _ in ids]
        whys = [""] * len(ids)
        for token in self.stream(ids, mask, sampling=sampling, max_new_tokens=max_new_tokens, rows=rows):
            tokens[token.row].append(token.id)
            whys[token.row] = token.why or ""
        return [Generated(*pair) for pair in zip(tokens, whys, strict=True)]

    def warm_up(self) -> None:
        """Read a little and write a token on, so that the next generation is as fast as later ones."""
        count = min(WARM_UP_TOKENS, self.generation.positions)
        ids = np.full((1, count), self.generation.pad_id, np.int64)
        _, cache = self.read(ids[:, 1:], np.ones_like(ids[:, 1:])) if count > 1 else (None, None)
        self.read(ids[:, :1], np.ones_like(ids[:, :1]), cache)

    def _written(self, last: Array, cache: Cache, sampler: Sampler, stop: Stop, limits: Tokens) -> Iterator[Token]:
        """The loop: choose by ``last`` [K, V], say so, read what was chosen."""
        inside = np.arange(len(last))  # the request's rows that are in the batch
        going = np.ones(len(last), bool)  # and of these, which are not at their end
        for count in range(1, int(limits.max()) + 1):
            self._require_finite(last, inside, going)
            tokens = np.where(going, sampler.choose(last), self.generation.pad_id)
            whys = stop.ends(tokens, count, limits[inside])
            yield from (Token(int(inside[at]), int(tokens[at]), whys[at]) for at in np.flatnonzero(going))
            going = going & np.array([why is None for why in whys])
            if not going.any():
                return
            # Copying what is kept costs about as much as a run does: not for every row that ends.
            if 2 * going.sum() <= len(going):
                staying = np.flatnonzero(going)
                inside, tokens, going = inside[staying], tokens[staying], going[staying]
                cache = self._kept(cache, staying)
                sampler.keep(staying)
            logits, cache = self.read(tokens[:, None], going[:, None].astype(np.int64), cache)
            last = logits[:, -1]

    def _kept(self, cache: Cache, rows: Tokens) -> Cache:
        """These rows of a cache."""
        held = {name: self._session.take_rows(value, rows) for name, value in cache.held.items()}
        return Cache(cache.variant, cache.mask[rows], held)

    def _nothing(self, batch: int) -> dict[str, Array]:
        """A past of no tokens."""
        return {spec.name: np.zeros(_empty_shape(spec, batch), spec.dtype) for spec in self._pasts}

    def _require_prompts(self, ids: Tokens, mask: Tokens, rows: Sequence[int]) -> None:
        """InputError unless there are tokens in every row, padding only on their left, and a number for each row."""
        if ids.ndim != 2 or not len(ids) or mask.shape != ids.shape or any(a.dtype != np.int64 for a in (ids, mask)):
            got = f"ids {ids.dtype}{list(ids.shape)} and mask {mask.dtype}{list(mask.shape)}"
            raise InputError(describe(f"{self.name}: prompts", got=got, expected="both int64[batch, sequence]"))
        if not mask.any(axis=1).all():
            raise InputError(describe(f"{self.name}: an empty prompt", expected="at least one token in every row"))
        if not mask[:, -1].all():
            raise InputError(describe(f"{self.name}: prompts are padded on the right", expected="on the left"))
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            got, expected = f"{ids.min()} to {ids.max()}", f"ids from 0 to {self.vocabulary - 1}"
            raise InputError(describe(f"{self.name}: tokens that the model does not have", got=got, expected=expected))
        if len(rows) != len(ids):
            raise InputError(describe(f"{self.name}: numbers of rows", got=len(rows), expected=len(ids)))

    def _require_finite(self, last: Array, inside: Tokens, going: npt.NDArray[np.bool_]) -> None:
        """What a row that is at its end reads is padding, and what follows from that nobody asked."""
        broken = going & ~np.isfinite(last).all(axis=1)
        if broken.any():
            raise not_finite(f"{self.name}: logits hold", got=f"row {', '.join(map(str, inside[broken][:5]))}")


def _fault(session: GatheringSession, generation: Generation) -> str:
    """What of a graph is not as docs/bundle.md, *Decoders*, says; empty when all is."""
    outputs = {spec.name: spec.shape for spec in session.outputs}
    pasts = {spec.name: spec.shape for spec in session.inputs if spec.name.startswith(f"{PAST}.")}
    others = {spec.name for spec in session.inputs} - pasts.keys()
    logits = outputs.get(LOGITS, [])
    if not {IDS, MASK} <= others <= {IDS, MASK, POSITIONS}:
        return f"inputs {', '.join(sorted(others)) or 'none'}"
    if len(logits) != 3 or not isinstance(logits[-1], int):
        return f"outputs {', '.join(outputs)}" if LOGITS not in outputs else f"{LOGITS} {logits}"
    if not pasts:
        return "no past"
    for name, shape in pasts.items():
        sized = len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int)
        if not sized or name.replace(PAST, PRESENT, 1) not in outputs:
            return f"{name} {shape}" if not sized else f"{name} without {PRESENT}"
    return "" if 0 <= generation.pad_id < logits[-1] else f"pad_id {generation.pad_id} of {logits[-1]} tokens"


def _empty_shape(spec: TensorSpec, batch: int) -> list[int]:
    """[B, heads, 0, head width] of one entry of a cache."""
    _, heads, _, width = spec.shape
    return [batch, _size(heads), 0, _size(width)]


def _size(axis: int | str) -> int:
    """The size of an axis that is the same in every run."""
    assert isinstance(axis, int), axis
    return axis
