"""Scores of a family's answers; the runtime is played by a table of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from calib.data import Examples
from calib.quality import evaluate, normalised, word_f1
from compexport.errors import InputError
from engines.runtime import Runtime

BACKBONE, SMALL = "variator-r1-fp32", "variator-r4-fp32"
Answer = Callable[[str, Any], dict[str, Any]]


def family(task: str, answer: Answer, labels: Sequence[str] = (), ratios: Sequence[int] = (4, 1)) -> Runtime:
    """A runtime whose variants answer with ``answer(variant, text)``."""
    variants = {
        f"variator-r{ratio}-fp32": SimpleNamespace(ratio=ratio, exits=None, is_stepper=False) for ratio in ratios
    }

    def answers(variant: str, texts: Sequence[Any], settings: Any) -> list[dict[str, Any]]:
        return [answer(variant, text) for text in texts]

    manifest = SimpleNamespace(task=task, labels=list(labels), variants=variants)
    return cast(
        Runtime,
        SimpleNamespace(
            members=SimpleNamespace(engines=tuple(variants), layers={}),
            bundle=SimpleNamespace(manifest=manifest),
            answers=answers,
            too_long=lambda texts: 0,
        ),
    )


def test_embeddings_are_compared_with_the_backbones() -> None:
    vectors = np.random.default_rng(0).normal(size=(70, 8))

    def answer(variant: str, text: str) -> dict[str, Any]:
        vector = vectors[int(text)]
        return {"embedding": (vector if variant == BACKBONE else 3 * vector + [2, *[0] * 7]).tolist()}

    done: list[float] = []
    examples = Examples([str(n) for n in range(70)], origin="texts.txt")
    result = evaluate(
        family("feature-extraction", answer), examples, progress=lambda _, at=None, total=None: done.append(at or 0)
    )
    assert result.table["metric"] == "cosine" and result.table["data"] == "texts.txt"
    assert result.table["backbone_variant"] == BACKBONE and list(result.table["variants"]) == [BACKBONE, SMALL]
    backbone, small = result.rows
    assert backbone["value"] == pytest.approx(1.0) and backbone["spearman"] == pytest.approx(1.0)
    assert 0.8 < small["value"] < 1.0 and 0.5 < small["spearman"] < 1.0
    assert small["drop"] == pytest.approx(1.0 - small["value"])
    assert done[-1] == 140 and done == sorted(done)
    assert set(result.document()) >= {"metric", "n", "variants"}


def test_labels_may_be_names_or_numbers() -> None:
    def answer(variant: str, text: str) -> dict[str, Any]:
        return {"label": "bad" if variant == SMALL or "awful" in text else "good"}

    runtime = family("sequence-classification", answer, ["bad", "good"])
    texts = ["nice", "awful", "awful nonsense", "fine"]
    labelled = evaluate(runtime, Examples(texts, labels=["Good", 0, "1", 1.0]))
    assert labelled.table["metric"] == "accuracy"
    assert labelled.table["variants"] == {BACKBONE: 0.75, SMALL: 0.25}
    alone = evaluate(runtime, Examples(texts))
    assert alone.table["metric"] == "agreement" and alone.table["variants"] == {BACKBONE: 1.0, SMALL: 0.5}
    swapped = Examples(texts, labels=["0", 1, 0, "0"], label_names=["good", "bad"])
    assert evaluate(runtime, swapped).table["variants"] == {BACKBONE: 0.75, SMALL: 0.25}
    with pytest.raises(InputError, match="row 2: unknown label: got 'meh', expected one of bad, good"):
        evaluate(runtime, Examples(["a", "b"], labels=["bad", "meh"], origin="x.csv"))


def test_tokens_are_matched_to_words() -> None:
    def answer(variant: str, text: str) -> dict[str, Any]:
        # "Ada Lovelace wrote": Ada | Love, lace | (space and) wrote
        return {"labels": ["PER", "PER", "O", "O" if variant == BACKBONE else "PER"],
                "offsets": [[0, 3], [4, 8], [8, 12], [12, 18]]}  # fmt: skip

    runtime = family("token-classification", answer, ["O", "PER"])
    words = Examples(["Ada Lovelace wrote"], labels=[["PER", "PER", "O"]])
    assert evaluate(runtime, words).table["variants"] == {BACKBONE: 1.0, SMALL: pytest.approx(2 / 3)}
    numbered = Examples(["Ada Lovelace wrote"], labels=[[0, 0, 1]], label_names=["PER", "O"])
    assert evaluate(runtime, numbered).table["variants"] == {BACKBONE: 1.0, SMALL: pytest.approx(2 / 3)}
    assert evaluate(runtime, Examples(words.texts, labels=["1 1 0"])).table["variants"][BACKBONE] == 1.0
    assert evaluate(runtime, Examples(words.texts)).table["variants"] == {BACKBONE: 1.0, SMALL: 0.75}
    with pytest.raises(InputError, match="got 2 labels, expected one for each of 3 words"):
        evaluate(runtime, Examples(words.texts, labels=[["O", "O"]]))


def test_answers_are_scored_as_squad_does() -> None:
    def answer(variant: str, text: tuple[str, str]) -> dict[str, Any]:
        return {"answer": "The Eiffel Tower" if variant == BACKBONE else "Eiffel"}

    runtime = family("question-answering", answer)
    asked = Examples(["what?"], ["The Eiffel Tower."], labels=[["eiffel tower", "a tower"]])
    result = evaluate(runtime, asked)
    assert result.table["metric"] == "f1"
    assert [row["exact_match"] for row in result.rows] == [1.0, 0.0]
    assert result.rows[1]["value"] == pytest.approx(2 / 3)
    agreement = evaluate(runtime, Examples(["what?"], ["The Eiffel Tower."]))
    assert agreement.table["metric"] == "agreement" and agreement.table["variants"] == {BACKBONE: 1.0, SMALL: 0.0}
    assert normalised("An answer!") == ["answer"] and word_f1([], []) == 1.0 and word_f1(["a"], []) == 0.0


def test_what_cannot_be_evaluated_is_said() -> None:
    def answer(variant: str, text: str) -> dict[str, Any]:
        return {"label": "score"}

    with pytest.raises(InputError, match="no examples"):
        evaluate(family("sequence-classification", answer, ["a", "b"]), Examples([]))
    with pytest.raises(InputError, match="the backbone is not among the variants"):
        evaluate(family("sequence-classification", answer, ["a", "b"], [4]), Examples(["x"]))
    with pytest.raises(InputError, match="a regression model"):
        evaluate(family("sequence-classification", answer, ["score"]), Examples(["x"]))
