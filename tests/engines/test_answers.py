"""Answers out: every task's output from hand-made logits, spans compared with trying all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compexport.errors import CompexportError
from engines.answers import MAX_ANSWER_TOKENS, answers, best_span, needed_outputs, softmax
from engines.text import EncodedText


@dataclass
class FakeEncoding:
    """The parts of ``tokenizers.Encoding`` that answers read."""

    offsets: list[tuple[int, int]]
    sequence_ids: list[int | None]
    overflowing: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets)


def encoded(text: str, pair: str | None = None) -> EncodedText:
    """[CLS] words [SEP] (words [SEP]), split at spaces."""
    offsets: list[tuple[int, int]] = [(0, 0)]
    ids: list[int | None] = [None]
    for which, part in enumerate([text] if pair is None else [text, pair]):
        start = 0
        for word in part.split(" "):
            if word:
                offsets.append((start, start + len(word)))
                ids.append(which)
            start += len(word) + 1
        offsets.append((0, 0))
        ids.append(None)
    return EncodedText(text, pair, FakeEncoding(offsets, ids), truncated=False)


def only(task: str, outputs: dict[str, Any], one: EncodedText, labels: list[str] | None = None) -> dict[str, Any]:
    arrays = {name: np.asarray([values], dtype=np.float32) for name, values in outputs.items()}
    (answer,) = answers(task, arrays, [one], labels or [])
    json.dumps(answer, allow_nan=False)  # plain Python values only
    return answer


def test_classification() -> None:
    answer = only("sequence-classification", {"logits": [0.0, np.log(3.0)]}, encoded("a"), ["bad", "good"])
    assert answer["label"] == "good"
    assert answer["scores"] == pytest.approx({"bad": 0.25, "good": 0.75})


def test_regression() -> None:
    answer = only("sequence-classification", {"logits": [3.5]}, encoded("a"), ["similarity"])
    assert answer == {"label": "similarity", "scores": {"similarity": 3.5}, "score": 3.5}


def test_labels_without_names() -> None:
    assert only("sequence-classification", {"logits": [0.0, 9.0]}, encoded("a"))["label"] == "LABEL_1"


def test_labels_that_disagree() -> None:
    with pytest.raises(CompexportError, match="engine and labels disagree: got 2 scores, expected 3"):
        only("sequence-classification", {"logits": [0.0, 9.0]}, encoded("a"), ["x", "y", "z"])


def test_huge_logits_do_not_overflow() -> None:
    answer = only("sequence-classification", {"logits": [-1e30, 1e30]}, encoded("a"), ["bad", "good"])
    assert answer["scores"] == {"bad": 0.0, "good": 1.0}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_engine_that_fails_silently(value: float) -> None:
    with pytest.raises(CompexportError, match="engine output logits holds NaN or infinity"):
        only("sequence-classification", {"logits": [0.0, value]}, encoded("a"), ["bad", "good"])


def test_token_labels_skip_special_tokens_and_padding() -> None:
    logits = [[9, 0], [0, 5], [5, 0], [9, 0], [0, 9], [0, 9]]
    answer = only("token-classification", {"logits": logits}, encoded("Bob  sings"), ["O", "PER"])
    assert answer["labels"] == ["PER", "O"]
    assert answer["tokens"] == ["Bob", "sings"]
    assert answer["offsets"] == [[0, 3], [5, 10]]
    assert answer["scores"] == pytest.approx([1 / (1 + np.exp(-5))] * 2)


def test_an_answer_is_cut_from_the_context() -> None:
    one = encoded("who sings", "today Bob Dylan sings")
    starts, ends = np.zeros(10), np.zeros(10)
    starts[[1, 5, 9]] = 20, 5, 30  # the question and the padding shout louder
    ends[[2, 6, 9]] = 20, 5, 30
    answer = only("question-answering", {"start_logits": starts, "end_logits": ends}, one)
    assert (answer["start"], answer["end"], answer["answer"]) == (6, 15, "Bob Dylan")
    assert answer["score"] == pytest.approx((np.exp(5) / (np.exp(5) + 3)) ** 2)


def test_a_question_without_context_tokens() -> None:
    one = encoded("who sings", " ")
    answer = only("question-answering", {"start_logits": [0.0] * 5, "end_logits": [0.0] * 5}, one)
    assert answer == {"start": -1, "end": -1, "answer": "", "score": 0.0}


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12), st.integers(1, 14))
def test_best_span_is_the_best_of_all(pairs: list[tuple[float, float]], max_tokens: int) -> None:
    starts, ends = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    first, last = best_span(starts, ends, max_tokens)
    assert 0 <= last - first < max_tokens
    assert starts[first] * ends[last] == max(
        starts[i] * ends[j] for i in range(len(starts)) for j in range(i, min(len(starts), i + max_tokens))
    )


def test_answers_have_a_bounded_length() -> None:
    words = " ".join(["w"] * 60)
    starts, ends = np.zeros(64), np.zeros(64)
    starts[3], ends[62] = 9.0, 9.0
    answer = only("question-answering", {"start_logits": starts, "end_logits": ends}, encoded("q", words))
    assert len(answer["answer"].split()) <= MAX_ANSWER_TOKENS


def test_embedding_as_the_graph_pools_it() -> None:
    outputs = {"sentence_embedding": [0.5, -1.0]}
    assert only("feature-extraction", outputs, encoded("a")) == {"embedding": [0.5, -1.0]}


def test_embedding_is_the_mean_over_the_text_without_padding() -> None:
    outputs = {"last_hidden_state": [[1, 2], [3, 4], [5, 9], [100, 100]]}
    assert only("feature-extraction", outputs, encoded("a")) == {"embedding": [3.0, 5.0]}


@pytest.mark.parametrize(
    ("task", "available", "needed"),
    [
        ("feature-extraction", ["last_hidden_state", "sentence_embedding"], ["sentence_embedding"]),
        ("feature-extraction", ["last_hidden_state"], ["last_hidden_state"]),
        ("sequence-classification", ["logits"], ["logits"]),
        ("token-classification", ["logits"], ["logits"]),
        ("question-answering", ["start_logits", "end_logits"], ["start_logits", "end_logits"]),
    ],
)
def test_needed_outputs(task: str, available: list[str], needed: list[str]) -> None:
    assert needed_outputs(task, available) == needed


def test_softmax_of_half_precision() -> None:
    scores = softmax(np.array([[60000, 60000]], dtype=np.float16))
    assert scores.dtype == np.float64
    assert scores.tolist() == [[0.5, 0.5]]
