"""Generation as a request sees it: what it asks for, texts in, texts out, and how good a decoder is.

Letters: B batch, S sequence, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from compexport.errors import InputError, describe
from engines.answers import Answer, Array, not_finite
from engines.causal import ROOM_BYTES, CausalGenerator
from engines.generate import Generated
from engines.manifest import GENERATION, Manifest
from engines.options import Options, options_for
from engines.sampling import Sampling
from engines.text import EncodedText, TextEncoder


def options_asked(
    manifest: Manifest, max_new_tokens: int | None, sampling: Sampling | None, settings: Mapping[str, Any] | None
) -> Options | None:
    """How texts are written: what was asked for, before the model's own settings. None for another task.

    ``settings``: by the names of ``engines.options.NAMES``; the others say the same about some of them. Raises
    InputError for a setting that cannot be, or that is there twice, and for any where the task is another.
    """
    asked = {} if settings is None else {name: value for name, value in settings.items() if value is not None}
    also: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    if sampling is not None:
        also |= {name: value for name, value in asdict(sampling).items() if value is not None}
    if manifest.generation is None:
        if what := next(iter([*asked, *also]), None):
            raise InputError(describe(f"{what} is for bundles that write text", got=f"the task {manifest.task}"))
        return None
    if twice := asked.keys() & also.keys():
        raise InputError(describe("a setting is there twice", got=min(twice), expected="each once"))
    return options_for(manifest.generation, {**asked, **also})


def room_for(manifest: Manifest, options: Options) -> int | None:
    """Tokens that a text may have, where it shares its positions with the new ones; the last one needs none.

    None for a model that writes into a text of its own. Raises InputError when none are left.
    """
    assert manifest.generation is not None
    positions = manifest.generation.max_positions
    if manifest.task != GENERATION or (positions is None and options.max_length is None):
        return None
    if options.max_length is not None:
        return max(1, min(options.max_length, manifest.generation.positions + 1) - 1)
    assert positions is not None
    room = positions + 1 - options.max_new_tokens
    if room < 1:
        expected = f"at most {positions}, the model's positions"
        raise InputError(describe("max_new_tokens", got=options.max_new_tokens, expected=expected))
    return room


def most_tokens(manifest: Manifest, options: Options, length: int) -> int:
    """New tokens that a text of ``length`` tokens can get at most."""
    assert manifest.generation is not None
    begun = length
    if manifest.task != GENERATION:
        begun = len(options.decoder_start_ids or manifest.generation.decoder_start_ids)
    longest = manifest.generation.positions + 1
    if options.max_length is not None:
        longest = min(longest, options.max_length)
    return max(1, min(options.max_new_tokens, longest - begun))


def rows_per_text(options: Options) -> int:
    """How many rows of a batch a text becomes while it is written."""
    return max(options.beams.num_beams, options.beams.num_return_sequences)


def written_answers(encoder: TextEncoder, written: Sequence[Generated]) -> list[Answer]:
    """One answer per text: ``text`` (what was written), its ``tokens`` and ``why`` it ends ("eos", "length", "budget").

    With beams its ``score`` too, and how many ``steps`` its search took; and where several texts were asked for the
    ``others``, each as the first but for its steps.
    """
    return [_answer(encoder, one) for one in written]


def _answer(encoder: TextEncoder, one: Generated) -> Answer:
    answer: Answer = {"text": encoder.decode(one.tokens), "tokens": one.tokens, "why": one.why}
    if one.score is not None:
        answer["score"] = one.score
    if one.steps is not None:
        answer["steps"] = one.steps
    if one.others:
        answer["others"] = [_answer(encoder, other) for other in one.others]
    return answer


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
