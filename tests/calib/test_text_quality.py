"""Scores of written texts: what leads, what counts as right, what lengths are kept and allowed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from calib import quality
from calib.data import Examples
from calib.text_quality import METRICS, output_tokens, require_meaning, text_scores, with_length
from compexport.errors import InputError
from engines.lengths import OutputLengths
from engines.manifest import TEXT2TEXT, Generation
from engines.runtime import Runtime

EXAMPLES = Examples(["readers", "readers", "leaders"], targets=["R EH D ER Z", "R IY D ER Z", "L IY D ER Z"])


def answers(*texts: str, why: str = "eos") -> list[dict[str, Any]]:
    return [{"text": text, "tokens": [5] * (len(text.split()) + 1), "why": why} for text in texts]


def family(written: dict[str, list[str]], **defaults: Any) -> Runtime:
    """Variants that write the same whatever they read, the first of ratio 1; a text has a token for each letter."""
    variants = {
        name: SimpleNamespace(ratio=number, exits=None, is_stepper=False)
        for number, name in enumerate(written, start=1)
    }
    generation = Generation(
        eos_ids=[1], bos_id=None, pad_id=0, max_positions=None, decoder_start_ids=[0], defaults=defaults
    )
    manifest = SimpleNamespace(task=TEXT2TEXT, labels=[], variants=variants, generation=generation)

    def write(variant: str, texts: list[str], settings: Any) -> list[dict[str, Any]]:
        return [answers(written[variant][EXAMPLES.texts.index(text)])[0] for text in texts]

    members = SimpleNamespace(engines=tuple(variants), layers={})
    count = SimpleNamespace(manifest=manifest)
    return cast(
        Runtime,
        SimpleNamespace(
            members=members,
            bundle=count,
            answers=write,
            token_counts=lambda texts: [len(text) for text in texts],
            too_long=lambda texts: 0,
        ),
    )


def test_a_text_accepts_every_target_that_it_has() -> None:
    given = answers("R IY D ER Z", "R IY D ER Z ", "L EH D ER Z")
    scores = text_scores(EXAMPLES, given, [], "exact_match")
    assert list(scores) == ["exact_match", "bleu", "word_error_rate"], "what leads comes first"
    assert scores["exact_match"] == pytest.approx(2 / 3) and scores["word_error_rate"] == pytest.approx(1 / 15)
    assert list(text_scores(EXAMPLES, given, [], None)) == list(METRICS)


def test_without_targets_the_backbone_is_right() -> None:
    truth = answers("a b c d", "a b c d", "e f g h")
    plain = Examples(EXAMPLES.texts)
    assert text_scores(plain, truth, truth, None) == {
        "bleu": pytest.approx(100),
        "exact_match": 1,
        "word_error_rate": 0,
    }
    assert text_scores(plain, answers("x", "x", "x"), truth, None)["exact_match"] == 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_a_drop_is_what_is_lost(metric: str) -> None:
    """Whichever way the metric goes."""
    whole = {"R1": ["R EH D ER Z"] * 2 + ["L IY D ER Z"], "R2": ["R EH D ER Z"] * 2 + ["L IY D Z Z Z"]}
    found = quality.evaluate(family(whole), EXAMPLES, metric=metric)
    drops = {row["variant"]: row["drop"] for row in found.rows}
    assert drops["R1"] == 0.0 < drops["R2"] and found.table["metric"] == metric
    assert found.table["higher_is_better"] is (metric != "word_error_rate")
    assert found.document()["output_tokens"]["p50"] == 6


def test_lengths_of_outputs_are_kept_with_those_of_their_sources() -> None:
    runtime = family({"R1": []})
    given = [*answers("a b", "a b c"), *answers("a b c d", why="length")]
    table = output_tokens(runtime, "R1", Examples(["x", "xx", "xxx"]), given, {"max_new_tokens": 5})
    assert {name: table[name] for name in ("variant", "max_new_tokens", "p50", "p99", "cut")} == {
        "variant": "R1", "max_new_tokens": 5, "p50": 4, "p99": 5, "cut": 1,
    }  # fmt: skip
    read = OutputLengths.from_table({"output_tokens": table})
    assert read is not None and read.groups[0].counts == {3: 1, 4: 1} and read.groups[0].longest == 3


def test_a_forced_end_is_a_cut() -> None:
    runtime = family({"R1": []})
    generation = runtime.bundle.manifest.generation
    assert generation is not None
    runtime.bundle.manifest.generation = generation.model_copy(update={"forced_eos_id": 1})
    given = answers("a b c d", "a b c d", "a")
    for settings in ({"max_new_tokens": 5}, {"max_length": 6}):
        table = output_tokens(runtime, "R1", Examples(["x", "x", "x"]), given, settings)
        assert (table["cut"], table["groups"][0]["tokens"]) == (2, [2])
    assert output_tokens(runtime, "R1", Examples(["x", "x", "x"]), given, {"max_new_tokens": 6})["cut"] == 0


def test_texts_may_be_as_long_as_the_longest_target() -> None:
    long = Examples(["x"], targets=["y" * 50])
    runtime = family({"R1": []})
    assert with_length(runtime, long, {}) == {"max_new_tokens": 50}
    assert with_length(runtime, EXAMPLES, {}) == {"max_new_tokens": 32}
    assert with_length(runtime, long, {"max_new_tokens": 7}) == {"max_new_tokens": 7}
    assert with_length(family({"R1": []}, max_length=20), long, {}) == {}, "the model's own"
    assert with_length(runtime, Examples(["x"]), {}) == {}


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="--metric: got rouge, expected bleu or exact_match or word_error_rate"):
        require_meaning(TEXT2TEXT, "rouge", {})
    for metric, settings in (("bleu", {}), (None, {"num_beams": 2})):
        with pytest.raises(InputError, match="is for bundles that read one text and write another: got text-gen"):
            require_meaning("text-generation", metric, settings)
    require_meaning("text-generation", None, {"num_beams": None})
