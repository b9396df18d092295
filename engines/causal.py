"""Models that write a text on: one graph reads a prompt and then every new token, after what is kept of the past.

Letters as in ``engines.generate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compexport.errors import BundleError, InputError, describe
from engines.generate import IDS, LOGITS, MASK, Begun, Generator
from engines.logit_rules import NOTHING
from engines.manifest import PAST, PRESENT, Generation, TensorSpec
from engines.options import Options
from engines.sampling import Array, Tokens
from engines.session import FetchRows, GatheringSession, Held, fed_dtype

POSITIONS = "position_ids"
WARM_UP_TOKENS = 4
ROOM_BYTES = 1 << 28  # for the logits of one run, which are of all positions where only the last counts


@dataclass(frozen=True, slots=True)
class Cache:
    """What a decoder has read. ``variant``: whose states they are; ``mask`` [B, T]: which positions hold a token."""

    variant: str
    mask: Tokens
    held: Mapping[str, Held]


class CausalGenerator(Generator):
    """One open decoder. Threads may share it; a ``Cache`` belongs to one generation at a time."""

    def __init__(self, name: str, session: GatheringSession, generation: Generation) -> None:
        """``name``: the variant's. The session belongs to the caller.

        Raises BundleError for a graph that cannot write.
        """
        if fault := _fault(session, generation):
            what = f"{name}: its graph is no decoder, or not this bundle's"
            raise BundleError(describe(what, got=fault, hint="build the bundle again"))
        super().__init__(
            name, generation, _size(next(spec for spec in session.outputs if spec.name == LOGITS).shape[-1])
        )
        self._session = session
        self._fetch_rows: FetchRows | None = getattr(session, "fetch_rows", None)
        self._fed = {spec.name for spec in session.inputs}
        self._pasts = [spec for spec in session.inputs if spec.name.startswith(f"{PAST}.")]
        self._presents = {spec.name: spec.name.replace(PAST, PRESENT, 1) for spec in self._pasts}

    def read(self, ids: Tokens, mask: Tokens, cache: Cache | None = None) -> tuple[Array, Cache]:
        """Read ``ids`` [B, S] after what is in ``cache``: logits [B, S, V], and the cache with them.

        ``mask`` [B, S] is 0 where there is no token; a prompt is padded on the left. Raises InputError for a cache of
        another variant or number of rows, or more tokens than the model has positions.
        """
        outputs, _, cache = self._read(ids, mask, cache, (LOGITS,), ())
        return outputs[LOGITS], cache

    def _read(
        self, ids: Tokens, mask: Tokens, cache: Cache | None, outputs: Sequence[str], hold: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, Held], Cache]:
        """``outputs`` as arrays, and those of ``hold`` where they were computed."""
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
        found, held = self._session.run_held(feeds, cache.held, outputs, [*self._presents.values(), *hold])
        kept = {past: held[now] for past, now in self._presents.items()}
        return found, held, Cache(self.name, whole, kept)

    def _read_last(self, ids: Tokens, mask: Tokens, cache: Cache | None) -> tuple[Array, Cache]:
        """As ``read``, but of the last position alone: logits [B, V], the only ones that leave the backend."""
        if self._fetch_rows is None or ids.shape[1] == 1:
            logits, cache = self.read(ids, mask, cache)
            return logits[:, -1], cache
        _, held, cache = self._read(ids, mask, cache, (), (LOGITS,))
        last = np.arange(1, len(ids) + 1) * ids.shape[1] - 1
        return self._fetch_rows(held[LOGITS], last), cache

    def read_prompt(self, ids: Tokens, mask: Tokens) -> tuple[Array, Cache]:
        """Read prompts [B, S], padded on the left: logits [B, V] after their last token, and the cache with them.

        In pieces, where the logits of all positions would take too much memory. Errors as ``read``.
        """
        piece = max(1, ROOM_BYTES // (4 * len(ids) * self.vocabulary))
        last, cache = self._read_last(ids[:, :piece], mask[:, :piece], None)
        for start in range(piece, ids.shape[1], piece):
            last, cache = self._read_last(ids[:, start : start + piece], mask[:, start : start + piece], cache)
        return last, cache

    def warm_up(self, shortest: int = 1) -> None:
        """Read a little and write a token on, so that the next generation is as fast as later ones."""
        count = min(max(WARM_UP_TOKENS, shortest + 1), self.generation.positions)
        ids = np.full((1, count), self.generation.pad_id, np.int64)
        _, cache = self.read(ids[:, 1:], np.ones_like(ids[:, 1:])) if count > 1 else (None, None)
        self.read(ids[:, :1], np.ones_like(ids[:, :1]), cache)

    def _begin(self, ids: Tokens, mask: Tokens, options: Options) -> Begun:
        last, cache = self.read_prompt(ids, mask)
        sources = [row[there == 1] for row, there in zip(ids, mask, strict=True)]
        return Begun(last, np.where(mask == 1, ids, NOTHING), sources, cache)

    def _step(self, tokens: Tokens, going: npt.NDArray[np.bool_], state: Cache) -> tuple[Array, Cache]:
        logits, cache = self.read(tokens[:, None], going[:, None].astype(np.int64), state)
        return logits[:, -1], cache

    def _take(self, state: Cache, rows: Tokens) -> Cache:
        held = {name: self._session.take_rows(value, rows) for name, value in state.held.items()}
        return Cache(state.variant, state.mask[rows], held)

    def _require_batch(self, ids: Tokens, mask: Tokens) -> None:
        """InputError unless padding is on the left only, and all tokens are the model's."""
        if not mask[:, -1].all():
            raise InputError(describe(f"{self.name}: prompts are padded on the right", expected="on the left"))
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            got, expected = f"{ids.min()} to {ids.max()}", f"ids from 0 to {self.vocabulary - 1}"
            raise InputError(describe(f"{self.name}: tokens that the model does not have", got=got, expected=expected))

    def _nothing(self, batch: int) -> dict[str, Array]:
        """A past of no tokens."""
        return {spec.name: np.zeros(_empty_shape(spec, batch), fed_dtype(spec.dtype)) for spec in self._pasts}


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
