"""What a ratio costs in quality: every member's engine answers the user's own examples through the runtime.

Engines are measured, not PyTorch. Without labels, the backbone's engine (ratio 1) is the truth.
"""

from __future__ import annotations

import logging
import math
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calib import text_quality
from calib.answering import Read, Work
from calib.data import Examples
from calib.exits import points_and_exits, rows_to_choose_on, split
from calib.exits_search import Search
from calib.labels import label_ids
from calib.progress import Progress, silent
from compexport.errors import InputError, describe
from engines.manifest import GENERATION, TEXT2TEXT, backbones
from engines.runtime import Runtime

_log = logging.getLogger(__name__)

PAIRS = 20_000  # pairs of texts, at most, whose similarities are ranked
ARTICLES = {"a", "an", "the"}

Answers = Sequence[Mapping[str, Any]]
NO_SEARCH = Search()


@dataclass(frozen=True)
class Evaluation:
    """``table`` is what ``quality.json`` keeps, ``rows`` one dict per variant, the backbone first."""

    table: dict[str, Any]
    rows: list[dict[str, Any]]

    def document(self) -> dict[str, Any]:
        """What ``evaluate --json`` prints. ``drop``: what the variant loses against the backbone, in the metric."""
        always = ("metric", "higher_is_better", "n", "data", "backbone_variant")
        names = (*always, "calibration", "points", "exits", "truth", "output_tokens")
        return {**{name: self.table[name] for name in names if name in self.table}, "variants": self.rows}


def evaluate(
    runtime: Runtime,
    examples: Examples,
    *,
    data: str = "",
    calibration: Examples | None = None,
    search: Search = NO_SEARCH,
    metric: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Let every variant of ``runtime`` answer ``examples`` and compare; nothing is written.

    Metrics: "cosine" with the backbone's embedding, and Spearman's correlation of pair similarities; "accuracy" of
    labels, per text or token; "f1" of answers, and exact matches. Without labels: "agreement" with the backbone. Of
    models that write texts on "next_token_accuracy", the share of tokens that were the likeliest one after those before
    them, and "perplexity". Of those that read one text and write another "bleu", "exact_match" and "word_error_rate" of
    whole texts, written by ``settings`` (``engines.options.NAMES``); ``metric`` is the one that leads. How long the
    backbone's texts are is kept too.
    Where variants have exits, thresholds are chosen (``search``) on ``calibration``, or on one half of ``examples``,
    and everything is measured on the rest; "calibration" says which.

    Raises InputError for no examples, a label the model does not have, a bundle without its backbone, a regression
    model, or calibration data where nothing has exits.
    """
    if not len(examples):
        raise InputError(describe("no examples to evaluate on", expected="at least one"))
    backbone, task = _backbone_variant(runtime), runtime.bundle.manifest.task
    settings = settings or {}
    text_quality.require_meaning(task, metric, settings)
    if task == TEXT2TEXT:
        text_quality.require_single(examples)
        settings = text_quality.with_length(runtime, examples, settings)
    layers = runtime.members.layers
    if calibration is not None and not layers:
        raise InputError(describe("calibration data", got=calibration.origin, expected="a bundle with exits"))
    parts = split(examples, calibration) if layers else None
    reported = examples if parts is None else parts.reported
    if too_long := runtime.too_long(reported.inputs):
        what = "%d of %d texts are longer than the model reads; the rest of each was cut off"
        _log.warning(what, too_long, len(reported))
    names = [backbone, *(name for name in runtime.members.engines if name != backbone)]
    total = len(names) * len(reported) + rows_to_choose_on(parts, backbone, layers)
    work = Work(runtime, progress, total, settings)
    found = {name: work.read(name, reported, search.statistic) for name in names if name in layers}
    values, truth = _scored(work, names, reported, found, _scorer(runtime, reported, metric))
    metric = next(iter(values[backbone]))
    table: dict[str, Any] = {
        "metric": metric,
        "higher_is_better": metric not in text_quality.LOWER_IS_BETTER,
        "n": len(reported),
        "data": data or examples.origin,
        "backbone_variant": backbone,
    }
    if task == TEXT2TEXT:
        table["truth"] = "targets" if reported.targets is not None else backbone
        table["output_tokens"] = text_quality.output_tokens(runtime, backbone, reported, truth, settings)
    if parts is not None:
        table["calibration"] = {"n": len(parts.chosen), "rows": parts.said}
        table |= points_and_exits(work, backbone, found, parts, _labels(truth), search)
        for name, point in table["points"].items():
            point["drop"] = values[backbone][metric] - point["value"]
            values[name] = {metric: point["value"]}
    table["variants"] = {name: one[metric] for name, one in values.items()}
    return Evaluation(table, _rows(values, backbone, metric))


def _scored(
    work: Work, names: Sequence[str], reported: Examples, found: Mapping[str, Read], score: Score
) -> tuple[dict[str, dict[str, float]], Answers]:
    """The metrics of every variant, and the answers of the first of them, the backbone."""
    values: dict[str, dict[str, float]] = {}
    truth: Answers = []
    for name in names:
        if name in found:
            given: Answers = [{"label": label} for label in found[name].labels]
        else:
            given = work.answers(name, reported)
        truth = truth or given
        values[name] = score(given, truth)
    return values, truth


def _rows(values: Mapping[str, Mapping[str, float]], backbone: str, metric: str) -> list[dict[str, Any]]:
    best, sign = values[backbone][metric], -1.0 if metric in text_quality.LOWER_IS_BETTER else 1.0
    return [
        {"variant": name, "value": found[metric], "drop": sign * (best - found[metric]),
         **{other: value for other, value in found.items() if other != metric}}
        for name, found in values.items()
    ]  # fmt: skip


def _backbone_variant(runtime: Runtime) -> str:
    variants, engines = runtime.bundle.manifest.variants, runtime.members.engines
    for name in backbones(variants):
        if name in engines:
            return name
    raise InputError(describe("the backbone is not among the variants", got=", ".join(engines), expected="ratio 1"))


# --- scores: each returns its metrics by name, the leading one first --------------------------------------------------

Score = Callable[[Answers, Answers], dict[str, float]]


def _scorer(runtime: Runtime, examples: Examples, metric: str | None) -> Score:
    manifest = runtime.bundle.manifest
    task, names = manifest.task, list(manifest.labels)
    if task == "feature-extraction":
        return _embedding_scores
    if task == GENERATION:
        return _next_token_scores
    if task == TEXT2TEXT:
        return lambda given, truth: text_quality.text_scores(examples, given, truth, metric)
    if task == "question-answering":
        return _span_scores(examples)
    if task == "token-classification":
        return _token_scores(examples, names)
    if len(names) == 1:
        raise InputError(describe("evaluate", got="a regression model", expected="a classifier"))
    return _class_scores(examples, names)


def _embedding_scores(given: Answers, truth: Answers) -> dict[str, float]:
    ours, theirs = (_unit(np.array([answer["embedding"] for answer in answers])) for answers in (given, truth))
    scores = {"cosine": float((ours * theirs).sum(1).mean())}
    first, second = _pairs(len(ours))
    if len(first) > 1:
        from scipy.stats import spearmanr

        similarities = ((x[first] * x[second]).sum(1) for x in (ours, theirs))
        scores["spearman"] = float(spearmanr(*similarities).statistic)
    return scores


def _unit(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12))


def _pairs(count: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """All pairs of texts, or ``PAIRS`` of them spread evenly."""
    first, second = np.triu_indices(count, 1)
    step = max(1, len(first) // PAIRS)
    return first[::step], second[::step]


def _next_token_scores(given: Answers, truth: Answers) -> dict[str, float]:
    """Over all tokens of all texts, so that long texts count more."""
    tokens, hits, likelihood = (sum(answer[name] for answer in given) for name in ("tokens", "hits", "log_likelihood"))
    if not tokens:
        raise InputError(describe("evaluate", got="texts of one token each", expected="some token after another"))
    return {"next_token_accuracy": hits / tokens, "perplexity": math.exp(min(-likelihood / tokens, 700.0))}


def _class_scores(examples: Examples, names: list[str]) -> Score:
    if examples.labels is None:
        return lambda given, truth: {"agreement": _share_equal(_labels(given), _labels(truth))}
    wanted = [names[index] for index in label_ids(examples.labels, names, examples.origin, examples.label_names)]
    return lambda given, truth: {"accuracy": _share_equal(_labels(given), wanted)}


def _token_scores(examples: Examples, names: list[str]) -> Score:
    """Per token. Labels are one per word, words are divided by spaces, and a word's first token answers for it."""
    if examples.labels is None:
        return lambda given, truth: {"agreement": _share_equal(_flat(given), _flat(truth))}
    wanted = [_word_labels(examples, row, names) for row in range(len(examples))]

    def accuracy(given: Answers, truth: Answers) -> dict[str, float]:
        right: list[str] = []
        ours: list[str] = []
        for text, labels, answer in zip(examples.texts, wanted, given, strict=True):
            by_word = _first_tokens(text, answer)
            # Words beyond the model's length have no answer and count as wrong.
            ours += [by_word.get(word, "") for word in range(len(labels))]
            right += labels
        return {"accuracy": _share_equal(ours, right)}

    return accuracy


def _share_equal(given: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(given, wanted, strict=True)) / max(len(wanted), 1)


def _labels(answers: Answers) -> list[str]:
    return [answer["label"] for answer in answers]


def _flat(answers: Answers) -> list[str]:
    return [label for answer in answers for label in answer["labels"]]


def _word_labels(examples: Examples, row: int, names: list[str]) -> list[str]:
    assert examples.labels is not None
    labels = examples.labels[row]
    labels = labels.split() if isinstance(labels, str) else labels
    words = examples.texts[row].split()
    where = f"{examples.origin}: row {row + 1}"
    if not isinstance(labels, list | tuple) or len(labels) != len(words):
        got = f"{len(labels)} labels" if isinstance(labels, list | tuple) else repr(labels)
        raise InputError(describe(f"{where}: labels", got=got, expected=f"one for each of {len(words)} words"))
    return [names[index] for index in label_ids(labels, names, where, examples.label_names)]


def _first_tokens(text: str, answer: Mapping[str, Any]) -> dict[int, str]:
    """Word number -> the label of the first token that lies in it."""
    starts = []
    position = 0
    for word in text.split():
        position = text.index(word, position)
        starts.append(position)
        position += len(word)
    found: dict[int, str] = {}
    for (_, end), label in zip(answer["offsets"], answer["labels"], strict=True):
        # By its last character: byte-level tokenizers count a leading space to the token.
        number = int(np.searchsorted(starts, max(end - 1, 0), side="right")) - 1
        found.setdefault(number, label)
    return found


def _span_scores(examples: Examples) -> Score:
    if examples.labels is None:
        return lambda given, truth: _match([[answer["answer"]] for answer in truth], given, "agreement", "overlap_f1")
    accepted = [list(label) if isinstance(label, list | tuple) else [label] for label in examples.labels]
    return lambda given, truth: _match([list(map(str, one)) for one in accepted], given, "f1", "exact_match")


def _match(accepted: Sequence[Sequence[str]], given: Answers, leading: str, other: str) -> dict[str, float]:
    """SQuAD's two numbers against the best of the accepted answers; no accepted answer means an empty one."""
    exact, overlap = [], []
    for choices, answer in zip(accepted, given, strict=True):
        words = normalised(answer["answer"])
        wanted = [normalised(choice) for choice in choices] or [[]]
        exact.append(float(any(words == one for one in wanted)))
        overlap.append(max(word_f1(words, one) for one in wanted))
    values = {"exact_match": exact, "agreement": exact, "f1": overlap, "overlap_f1": overlap}
    return {name: float(np.mean(values[name])) for name in (leading, other)}


def normalised(answer: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD compares answers."""
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in bare.split() if word not in ARTICLES]


def word_f1(words: Sequence[str], wanted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the words of two answers; two empty ones agree."""
    if not words or not wanted:
        return float(words == wanted)
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted))
