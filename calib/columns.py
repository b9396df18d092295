"""Which column of a data file serves as what: named by the caller, or recognised by its usual name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compexport.errors import InputError, describe

# Usual names, most telling first; compared without case. Pairs come before single texts: in a table with a question and
# a sentence both are read. The raw files of MRPC ("#1 String") and QQP (question1) have names of their own.
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("#1 string", "#2 string"),
    ("premise", "hypothesis"),
    ("question", "context"),
    ("question", "sentence"),
    ("question", "answer_sentence"),
    ("text", "text_pair"),
    ("text", "text2"),
    ("sentence", "sentence2"),
)
TEXT_NAMES = (
    *("text", "sentence", "sentence1", "source", "question", "premise", "review", "content", "tokens", "words"),
    *("question1", "#1 string"),
)
LABEL_NAMES = (
    *("gold_label", "label", "labels", "is_duplicate", "answers", "answer", "ner_tags", "tags", "class", "category"),
    *("score", "quality"),
)
TARGET_NAMES = ("target", "summary", "translation")


@dataclass(frozen=True)
class Columns:
    """Which column serves as what; None where there is none."""

    text: str
    text_pair: str | None = None
    label: str | None = None
    target: str | None = None

    def __str__(self) -> str:
        chosen = {"text": self.text, "text-pair": self.text_pair, "label": self.label, "target": self.target}
        return ", ".join(f"{role} = {name}" for role, name in chosen.items() if name is not None)


def choose_columns(
    names: Sequence[str],
    origin: str,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    target: str | None = None,
) -> Columns:
    """The columns asked for, and for the rest the usual names; InputError lists what there is."""
    for role, name in {"text": text, "text-pair": text_pair, "label": label, "target": target}.items():
        if name is not None and name not in names:
            raise InputError(describe(f"{origin}: no column for --{role}", got=name, expected=listed(names)))
    first, second = _texts(names) if text is None else (text, None)
    if first is None:
        hint = "name the column with --text"
        raise InputError(
            describe(f"{origin}: no text column recognised", expected=f"one of {listed(names)}", hint=hint)
        )
    return Columns(
        text=first,
        text_pair=text_pair or second,
        label=label or _recognised(LABEL_NAMES, names),
        target=target or _recognised(TARGET_NAMES, names),
    )


def _texts(names: Sequence[str]) -> tuple[str | None, str | None]:
    """The columns of a known pair of texts, else the one column of a text."""
    for pair in PAIR_NAMES:
        first, second = (_recognised((name,), names) for name in pair)
        if first is not None and second is not None:
            return first, second
    return _recognised(TEXT_NAMES, names), None


def _recognised(usual: Iterable[str], names: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def listed(names: Sequence[str]) -> str:
    """Column names for a message."""
    return ", ".join(names) or "no columns at all"
