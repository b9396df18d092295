"""How good and how long the texts are that a family writes, compared with targets or with what ratio 1 writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calib.data import Examples
from calib.text_scores import bleu, edit_share, wrong_share
from compexport.errors import InputError, describe
from engines.lengths import OutputLengths
from engines.manifest import TEXT2TEXT
from engines.options import MAX_NEW_TOKENS, options_for
from engines.runtime import Runtime
from engines.sampling import EOS
from engines.writing import most_tokens

Answers = Sequence[Mapping[str, Any]]
Settings = Mapping[str, Any]

BLEU, EXACT_MATCH, WORD_ERROR_RATE = "bleu", "exact_match", "word_error_rate"
METRICS = (BLEU, EXACT_MATCH, WORD_ERROR_RATE)
LOWER_IS_BETTER = (WORD_ERROR_RATE,)


def require_meaning(task: str, metric: str | None, settings: Settings) -> None:
    """InputError for a metric that is none, and for any of both where no texts are written to be compared."""
    if metric is not None and metric not in METRICS:
        raise InputError(describe("--metric", got=metric, expected=" or ".join(METRICS)))
    for what, given in (("--metric", metric), *settings.items()):
        if given is not None and task != TEXT2TEXT:
            raise InputError(describe(f"{what} is for bundles that read one text and write another", got=task))


def require_single(examples: Examples) -> None:
    """InputError for pairs of texts: such a model reads one."""
    if examples.pairs is not None:
        what, got = f"{examples.origin}: texts to read", f"two columns, {examples.columns_chosen}"
        raise InputError(describe(what, got=got, expected="one", hint="name it by --text"))


def with_length(runtime: Runtime, examples: Examples, settings: Settings) -> Settings:
    """``settings``, and where they and the model say nothing of a length, one that fits the longest target."""
    generation = runtime.bundle.manifest.generation
    assert generation is not None
    names = {"max_new_tokens", "max_length"}
    said = {name for name, value in settings.items() if value is not None} | generation.defaults.keys()
    if said & names or examples.targets is None:
        return settings
    longest = max(runtime.token_counts([target for target in examples.targets if target.strip()] or ["-"]))
    return {**settings, "max_new_tokens": max(MAX_NEW_TOKENS, longest)}


def text_scores(examples: Examples, given: Answers, truth: Answers, metric: str | None) -> dict[str, float]:
    """All metrics by name, the leading one (``metric``, BLEU for None) first.

    A text that is there several times accepts each of its targets. Without targets what ratio 1 wrote (``truth``) is
    the target.
    """
    texts = [answer["text"].strip() for answer in given]
    wanted = examples.targets if examples.targets is not None else [answer["text"] for answer in truth]
    wanted = [target.strip() for target in wanted]
    accepted = _accepted(examples, wanted)
    scores = {
        BLEU: bleu(texts, wanted),
        EXACT_MATCH: 1.0 - wrong_share(texts, accepted),
        WORD_ERROR_RATE: edit_share(texts, accepted),
    }
    leading = metric or BLEU
    return {leading: scores.pop(leading), **scores}


def _accepted(examples: Examples, wanted: Sequence[str]) -> list[list[str]]:
    by_source: dict[object, list[str]] = {}
    for source, target in zip(examples.inputs, wanted, strict=True):
        by_source.setdefault(source, []).append(target)
    return [by_source[source] for source in examples.inputs]


def output_tokens(runtime: Runtime, variant: str, examples: Examples, given: Answers, settings: Settings) -> Settings:
    """How long the outputs of ``variant`` are by the lengths of their sources, as ``quality.json`` keeps it.

    With beams, how long they became before the search ended: that is what takes time.
    """
    manifest = runtime.bundle.manifest
    assert manifest.generation is not None
    options, sources = options_for(manifest.generation, settings), runtime.token_counts(examples.inputs)
    written = [answer.get("steps", len(answer["tokens"])) for answer in given]
    # A forced end looks like any other, and beams that got no longer may have found whole texts before.
    forced = options.rules.forced_eos_id is not None or options.beams.num_beams > 1
    cut = [
        answer["why"] != EOS or (forced and tokens >= most_tokens(manifest, options, source))
        for answer, tokens, source in zip(given, written, sources, strict=True)
    ]
    lengths = OutputLengths.measured(sources, written, cut)
    usual, longest = (int(np.quantile(written, share, method="higher")) for share in (0.5, 0.99))
    whole = {"p50": usual, "p99": longest, "cut": sum(cut)}
    how = {"max_new_tokens": options.max_new_tokens, "num_beams": options.beams.num_beams}
    return {"variant": variant, **how, **whole, "groups": lengths.table()}
