"""Generation as a request sees it: texts in, texts out, how long that should take, and how good a decoder is.

Letters: B batch, S sequence, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compexport.errors import InputError, describe
from engines.answers import Answer, Array, not_finite
from engines.causal import ROOM_BYTES, CausalGenerator
from engines.generate import Generator
from engines.manifest import GENERATION, Generation
from engines.options import MAX_NEW_TOKENS, Options
from engines.points import is_part, token_name
from engines.profile import Prediction, Profile, check_count
from engines.sampling import GREEDY, Sampling
from engines.text import EncodedText, TextEncoder


@dataclass(frozen=True, slots=True)
class Writing:
    """How texts are written on: at most so many tokens, chosen by ``sampling``."""

    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        """Raises InputError for a number of tokens below 1."""
        check_count("max_new_tokens", self.max_new_tokens)

    def room(self, generation: Generation) -> int:
        """Tokens that a prompt may have so that all new ones find a position; the last one needs none.

        Raises InputError when that is none.
        """
        room = generation.positions + 1 - self.max_new_tokens
        if room < 1:
            expected = f"at most {generation.positions}, the model's positions"
            raise InputError(describe("max_new_tokens", got=self.max_new_tokens, expected=expected))
        return room


def writing_for(task: str, max_new_tokens: int | None, sampling: Sampling | None) -> Writing | None:
    """What was asked for, defaults filled in; None for another task, InputError when something was asked for there."""
    if task == GENERATION:
        return Writing(MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens, sampling or GREEDY)
    for what, given in (("max_new_tokens", max_new_tokens), ("sampling", sampling)):
        if given is not None:
            raise InputError(describe(f"{what} is for bundles that write text", got=f"the task {task}"))
    return None


def predict_writing(profile: Profile, shapes: Sequence[tuple[int, int]], new_tokens: int) -> Mapping[str, Prediction]:
    """Writing ``new_tokens`` to (batch, length) chunks after each other, for every variant whose tokens were measured.

    A prompt gives the first token; each other one costs a run over what is kept, whose time grows evenly with it, so
    that the one in the middle stands for all. Texts that end early take less.
    """
    whole = profile.predict_chunks(shapes)
    found = {name: one for name, one in whole.items() if not is_part(name) and token_name(name) in whole}
    for batch, length in shapes:
        tokens = profile.predict_all(batch, length + max(new_tokens - 2, 0) // 2)
        for name, prediction in found.items():
            token, count = tokens[token_name(name)], new_tokens - 1
            later = Prediction(count * token.p50_ms, count * token.p99_ms, token.extrapolated and count > 0)
            found[name] = prediction + later
    return found


def write(
    generator: Generator, encoder: TextEncoder, chunk: Sequence[EncodedText], rows: Sequence[int], writing: Writing
) -> list[Answer]:
    """One answer per text: ``text`` (what follows it), its ``tokens`` and ``why`` it ends ("eos" or "length").

    ``rows``: the numbers of the texts in their request.
    """
    feeds = encoder.feeds(chunk)
    written = generator.generate(
        feeds["input_ids"],
        feeds["attention_mask"],
        options=Options(max_new_tokens=writing.max_new_tokens, sampling=writing.sampling),
        rows=rows,
    )
    return [{"text": encoder.decode(one.tokens), "tokens": one.tokens, "why": one.why} for one in written]


def next_token_scores(generator: CausalGenerator, encoder: TextEncoder, encoded: Sequence[EncodedText]) -> list[Answer]:
    """How well each text is foreseen, read as it stands: of its tokens but the first, ``tokens`` in number,

    so many ``hits`` were the likeliest ones, and the sum of their ``log_likelihood``, natural. Raises CompexportError
    for logits that are not finite.
    """
    longest = max(map(len, encoded))
    size = max(1, ROOM_BYTES // (4 * longest * generator.vocabulary))
    found: list[Answer] = []
    for start in range(0, len(encoded), size):
        feeds = encoder.feeds(encoded[start : start + size])
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        logits, _ = generator.read(ids, mask)
        for row in range(len(ids)):
            real = mask[row] == 1
            found.append(_scores(generator.name, logits[row, real], ids[row, real]))
    return found


def _scores(name: str, logits: Array, ids: Array) -> Answer:
    """[S, V] and [S] of one text without padding."""
    if not np.isfinite(logits).all():
        raise not_finite(f"{name}: logits hold")
    given, wanted = logits[:-1], ids[1:]
    most = given.max(axis=1, initial=-np.inf)
    sums = np.exp(given - most[:, None]).sum(axis=1, dtype=np.float64)
    likelihood = given[np.arange(len(wanted)), wanted].astype(np.float64) - most - np.log(sums)
    hits = int((given.argmax(axis=1) == wanted).sum()) if len(wanted) else 0
    return {"tokens": len(wanted), "hits": hits, "log_likelihood": float(likelihood.sum())}
