"""Models that read one text and write another: an encoder once, the decoder's first step, then a step for every token.

What the decoder keeps of the text that is read does not change while it writes: it moves only when rows leave the
batch, or once, when each row becomes as many beams. Letters as in ``engines.generate``; n tokens of the text that is
read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compexport.errors import BundleError, InputError, describe
from engines.generate import IDS, LOGITS, MASK, Begun, Generator
from engines.manifest import PAST, PRESENT, Generation, TensorSpec
from engines.options import Options
from engines.sampling import Array, Tokens
from engines.session import GatheringSession, Held

ENCODER_MASK, ENCODED, HIDDEN = "encoder_attention_mask", "encoder_hidden_states", "last_hidden_state"
OWN, SOURCE = "decoder", "encoder"  # parts of the names of what is kept: of the text written, and of the one read
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Kept:
    """What a decoder has read. ``own``: of its text; ``source``: of that of the encoder, of which ``mask`` [K, n] says

    which positions hold a token; ``rows`` [K]: whose text of the batch each row is written from.
    """

    own: Mapping[str, Held]
    source: Mapping[str, Held]
    mask: Tokens
    rows: Tokens


class Seq2SeqGenerator(Generator):
    """An open encoder, and the decoder of a variant in its two forms. Threads may share it."""

    def __init__(
        self,
        name: str,
        encoder: GatheringSession,
        first: GatheringSession,
        cached: GatheringSession,
        generation: Generation,
    ) -> None:
        """``name``: the variant's. The sessions belong to the caller.

        Raises BundleError for graphs that cannot write, or not together.
        """
        if fault := _fault(encoder, first, cached, generation):
            what = f"{name}: its graphs are no encoder and decoder, or not this bundle's"
            raise BundleError(describe(what, got=fault, hint="build the bundle again"))
        logits = next(spec for spec in first.outputs if spec.name == LOGITS)
        super().__init__(name, generation, int(logits.shape[-1]))
        self._encoder, self._first, self._cached = encoder, first, cached
        pasts = [spec.name for spec in cached.inputs if spec.name.startswith(f"{PAST}.")]
        presents = {past: past.replace(PAST, PRESENT, 1) for past in pasts}
        self._own = {past: now for past, now in presents.items() if f".{OWN}." in past}
        self._source = {past: now for past, now in presents.items() if f".{SOURCE}." in past}

    def encode(self, ids: Tokens, mask: Tokens) -> Held:
        """Read texts [B, n], padded on the right: what the encoder makes of them, in the backend's memory."""
        return self._encoder.run_held({IDS: ids, MASK: mask}, {}, (), (HIDDEN,))[1][HIDDEN]

    def first_step(self, encoded: Held, mask: Tokens, prompt: Tokens) -> tuple[Array, Kept]:
        """Read ``prompt`` [B, T], what each text begins with: logits [B, V] after it, and what is kept."""
        names = [*self._own.values(), *self._source.values()]
        feeds = {ENCODER_MASK: mask, IDS: prompt}
        outputs, held = self._first.run_held(feeds, {ENCODED: encoded}, (LOGITS,), names)
        own = {past: held[now] for past, now in self._own.items()}
        source = {past: held[now] for past, now in self._source.items()}
        return outputs[LOGITS][:, -1], Kept(own, source, mask, np.arange(len(mask)))

    def cached_step(self, tokens: Tokens, kept: Kept) -> tuple[Array, Kept]:
        """Read ``tokens`` [K] after what is kept: logits [K, V], and what is kept with them."""
        feeds = {ENCODER_MASK: kept.mask, IDS: tokens[:, None]}
        outputs, held = self._cached.run_held(feeds, {**kept.own, **kept.source}, (LOGITS,), list(self._own.values()))
        own = {past: held[now] for past, now in self._own.items()}
        return outputs[LOGITS][:, -1], Kept(own, kept.source, kept.mask, kept.rows)

    def warm_up(self, shortest: int = 1) -> None:
        """Read a little and write two tokens, so that the next generation is as fast as later ones."""
        count = min(max(WARM_UP_TOKENS, shortest), self.generation.positions)
        ids = np.full((1, count), self.generation.pad_id, np.int64)
        prompt = np.array([self.generation.decoder_start_ids], np.int64)
        _, kept = self.first_step(self.encode(ids, np.ones_like(ids)), np.ones_like(ids), prompt)
        if prompt.shape[1] < self.generation.positions:
            self.cached_step(prompt[:, 0], kept)

    def _begin(self, ids: Tokens, mask: Tokens, options: Options) -> Begun:
        prompt = np.array(options.decoder_start_ids or self.generation.decoder_start_ids, np.int64)
        self._require_prompt(prompt)
        prompts = np.tile(prompt, (len(ids), 1))
        last, kept = self.first_step(self.encode(ids, mask), mask, prompts)
        return Begun(last, prompts, [row[there == 1] for row, there in zip(ids, mask, strict=True)], kept)

    def _step(self, tokens: Tokens, going: npt.NDArray[np.bool_], state: Kept) -> tuple[Array, Kept]:
        return self.cached_step(tokens, state)

    def _take(self, state: Kept, rows: Tokens) -> Kept:
        if np.array_equal(rows, np.arange(len(state.rows))):
            return state
        own = {name: self._cached.take_rows(value, rows) for name, value in state.own.items()}
        texts = state.rows[rows]
        if np.array_equal(texts, state.rows):
            return Kept(own, state.source, state.mask, texts)
        source = {name: self._cached.take_rows(value, rows) for name, value in state.source.items()}
        return Kept(own, source, state.mask[rows], texts)

    def _require_batch(self, ids: Tokens, mask: Tokens) -> None:
        """InputError unless padding is on the right only, and texts are as the encoder reads them."""
        if not mask[:, 0].all() or (np.diff(mask, axis=1) > 0).any():
            raise InputError(describe(f"{self.name}: texts are padded on the left", expected="on the right"))
        self._require_tokens("tokens that the model does not have", ids)
        if ids.shape[1] > self.generation.positions:
            expected = f"at most {self.generation.positions}"
            raise InputError(describe(f"{self.name}: tokens", got=ids.shape[1], expected=expected))

    def _require_prompt(self, prompt: Tokens) -> None:
        self._require_tokens("decoder_start_ids", prompt)
        if len(prompt) > self.generation.positions:
            expected = f"at most {self.generation.positions}, the model's positions"
            raise InputError(describe(f"{self.name}: decoder_start_ids", got=len(prompt), expected=expected))

    def _require_tokens(self, what: str, ids: Tokens) -> None:
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            got, expected = f"{ids.min()} to {ids.max()}", f"ids from 0 to {self.vocabulary - 1}"
            raise InputError(describe(f"{self.name}: {what}", got=got, expected=expected))


def _fault(encoder: GatheringSession, first: GatheringSession, cached: GatheringSession, generation: Generation) -> str:
    """What of the graphs is not as docs/bundle.md, *Encoders and decoders*, says; empty when all is."""
    pasts = {spec.name for spec in cached.inputs if spec.name.startswith(f"{PAST}.")}
    presents = {name.replace(PAST, PRESENT, 1) for name in pasts}
    grown = {name for name in presents if f".{OWN}." in name}
    logits = next((spec.shape for spec in first.outputs if spec.name == LOGITS), [])
    faults = [
        _differs("encoder inputs", encoder.inputs, {IDS, MASK}),
        _differs("encoder outputs", encoder.outputs, {HIDDEN}),
        _differs("decoder inputs", first.inputs, {IDS, ENCODER_MASK, ENCODED}),
        _differs("decoder outputs", first.outputs, {LOGITS} | presents),
        _differs("decoder-with-past inputs", cached.inputs, {IDS, ENCODER_MASK} | pasts),
        _differs("decoder-with-past outputs", cached.outputs, {LOGITS} | grown),
        "" if grown and grown != presents else "nothing that is kept",
        "" if len(logits) == 3 and isinstance(logits[-1], int) else f"{LOGITS} {logits}",
        "" if generation.decoder_start_ids else "no decoder_start_ids",
    ]
    found = next((fault for fault in faults if fault), "")
    if found or 0 <= generation.pad_id < int(logits[-1]):
        return found
    return f"pad_id {generation.pad_id} of {logits[-1]} tokens"


def _differs(what: str, specs: Sequence[TensorSpec], expected: set[str]) -> str:
    names = {spec.name for spec in specs}
    return "" if names == expected else f"{what} {', '.join(sorted(names)) or 'none'}"
