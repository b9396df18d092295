"""Answers out: what an engine's outputs mean, per task, as plain Python values ready for JSON. Pure numpy.

Letters: B batch, S sequence, C classes, H hidden size. Every function takes one row of the batch; padding beyond a
text's own tokens is cut off first, so padded rows answer as they would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from compexport.errors import CompexportError, describe
from engines.text import EncodedText

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Answer = dict[str, Any]

MAX_ANSWER_TOKENS = 30  # longer spans are almost always two spans glued together
NO_CONTEXT = -1  # start and end of an answer from a context without a single token left


def needed_outputs(task: str, available: Sequence[str]) -> list[str]:
    """The graph outputs that ``task`` reads, so that nothing else is computed or copied."""
    if task == "question-answering":
        return ["start_logits", "end_logits"]
    if task == "feature-extraction":
        return ["sentence_embedding" if "sentence_embedding" in available else "last_hidden_state"]
    return ["logits"]


def answers(
    task: str, outputs: Mapping[str, Array], encoded: Sequence[EncodedText], labels: Sequence[str]
) -> list[Answer]:
    """One answer per row. ``outputs``: [B, ...] by name, as ``needed_outputs`` lists them.

    Raises CompexportError when the engine returned NaN or infinity.
    """
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise not_finite(f"engine output {name} holds")
    answer = _ANSWERS[task]
    return [
        answer({name: values[row] for name, values in outputs.items()}, one, labels) for row, one in enumerate(encoded)
    ]


def not_finite(what: str, got: str | None = None) -> CompexportError:
    """The error for values that ``what`` names, like "engine output logits holds"; ``got`` says where."""
    hint = "build with --precision fp32 or check the model"
    return CompexportError(describe(f"{what} NaN or infinity", got=got, hint=hint))


def classify(outputs: Mapping[str, Array], encoded: EncodedText, labels: Sequence[str]) -> Answer:
    """``logits`` [C] -> the likeliest label and every label's probability.

    One label is a regression: its ``scores`` hold the number itself, repeated under ``score``.
    """
    logits = outputs["logits"]
    names = label_names(labels, len(logits))
    if len(logits) == 1:
        score = float(logits[0])
        return {"label": names[0], "scores": {names[0]: score}, "score": score}
    scores = softmax(logits)
    return {"label": names[int(scores.argmax())], "scores": dict(zip(names, scores.tolist(), strict=True))}


def label_tokens(outputs: Mapping[str, Array], encoded: EncodedText, labels: Sequence[str]) -> Answer:
    """``logits`` [S, C] -> lists of equal length, one entry per token that is not special.

    ``labels``, their probabilities ``scores``, ``tokens`` (the characters read), ``offsets`` (start and end character).
    """
    sources = [(position, which) for position, which in enumerate(encoded.sequence_ids) if which is not None]
    positions = [position for position, _ in sources]
    scores = softmax(outputs["logits"][positions])
    names = label_names(labels, scores.shape[-1])
    spans = [encoded.offsets[position] for position in positions]
    return {
        "labels": [names[best] for best in scores.argmax(axis=-1)],
        "scores": scores.max(axis=-1).tolist(),
        "tokens": [encoded.source(which)[a:b] for (_, which), (a, b) in zip(sources, spans, strict=True)],
        "offsets": [list(span) for span in spans],
    }


def cut_answer(outputs: Mapping[str, Array], encoded: EncodedText, labels: Sequence[str]) -> Answer:
    """``start_logits`` and ``end_logits`` [S] -> the best span inside the context.

    ``start`` and ``end`` are characters of the context, ``answer == context[start:end]``, ``score`` is the product of
    both probabilities over the context's tokens. A context without tokens: empty answer, start and end -1.
    """
    positions = [position for position, which in enumerate(encoded.sequence_ids) if which == 1]
    if not positions:
        return {"start": NO_CONTEXT, "end": NO_CONTEXT, "answer": "", "score": 0.0}
    starts = softmax(outputs["start_logits"][positions])
    ends = softmax(outputs["end_logits"][positions])
    first, last = best_span(starts, ends, MAX_ANSWER_TOKENS)
    offsets = encoded.offsets
    start, end = offsets[positions[first]][0], offsets[positions[last]][1]
    score = float(starts[first] * ends[last])
    return {"start": start, "end": end, "answer": encoded.source(1)[start:end], "score": score}


def embed(outputs: Mapping[str, Array], encoded: EncodedText, labels: Sequence[str]) -> Answer:
    """``sentence_embedding`` [H] as it is, or the mean of ``last_hidden_state`` [S, H] over the text's tokens."""
    if "sentence_embedding" in outputs:
        return {"embedding": outputs["sentence_embedding"].tolist()}
    return {"embedding": outputs["last_hidden_state"][: len(encoded)].mean(axis=0).tolist()}


def best_span(starts: Floats, ends: Floats, max_tokens: int) -> tuple[int, int]:
    """First and last position with the largest ``starts[first] * ends[last]``, 0 <= last - first < max_tokens.

    Among equals the shortest, then the earliest.
    """
    best = (-1.0, 0, 0)
    for extra in range(min(max_tokens, len(starts))):
        products = starts[: len(starts) - extra] * ends[extra:]
        first = int(products.argmax())
        if products[first] > best[0]:
            best = (float(products[first]), first, first + extra)
    return best[1], best[2]


def softmax(logits: Array) -> Floats:
    """Probabilities over the last axis, in float64 whatever the engine's precision."""
    wide = logits.astype(np.float64)
    exponentials = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def label_names(labels: Sequence[str], count: int) -> list[str]:
    """The manifest's labels, or LABEL_0, LABEL_1, ... when it has none; CompexportError when they are not ``count``."""
    if not labels:
        return [f"LABEL_{index}" for index in range(count)]
    if len(labels) != count:
        raise CompexportError(describe("engine and labels disagree", got=f"{count} scores", expected=len(labels)))
    return list(labels)


_ANSWERS: dict[str, Callable[[Mapping[str, Array], EncodedText, Sequence[str]], Answer]] = {
    "sequence-classification": classify,
    "token-classification": label_tokens,
    "question-answering": cut_answer,
    "feature-extraction": embed,
    "label-words": classify,
}
