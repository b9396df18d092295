"""``label_words.json``: how a generating model answers as a classifier.

The text is put into a template, the decoder reads a fixed prefix, and the vocabulary's logits after its last id,
restricted to the first sub-token of one word per label, are the labels' logits.
Source: the classification protocol of Variator's official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compexport.errors import InputError, describe
from engines.manifest import LabelWords
from exporter.identity import LABEL_WORDS

MAX_PREFIX = 16  # ids; all of them run through the decoder for every text
OFFICIAL_START, SENTINEL = 2, "<extra_id_0>"  # the prefix that the official code gives to T5


class _File(BaseModel):
    """What the file holds; ``decoder_input_ids`` may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    labels: list[str] = Field(min_length=2)
    words: list[str] = Field(min_length=2)
    template: str
    decoder_input_ids: list[int] | None = Field(default=None, min_length=1, max_length=MAX_PREFIX)


def read_label_words(folder: Path, tokenizer_json: str, config: Any) -> tuple[list[str], LabelWords]:
    """Labels of ``folder`` and the rest of its file, ids resolved; InputError names what is wrong with it."""
    from tokenizers import Tokenizer

    path = folder / LABEL_WORDS
    found = _parse(path)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    prefix = found.decoder_input_ids
    if prefix is None:
        prefix = _default_prefix(path, tokenizer, config)
    unknown = [number for number in prefix if not 0 <= number < config.vocab_size]
    if unknown:
        expected = f"ids from 0 to {config.vocab_size - 1}"
        raise InputError(describe(f"{path}: decoder_input_ids", got=unknown[0], expected=expected))
    ids = _first_ids(path, tokenizer, found.words)
    try:
        words = LabelWords(words=found.words, word_ids=ids, decoder_input_ids=prefix, template=found.template)
    except ValidationError as error:
        expected = "one {text} and at most one {text_pair}"
        raise InputError(describe(f"{path}: template", got=repr(found.template), expected=expected)) from error
    return found.labels, words


def _parse(path: Path) -> _File:
    try:
        found = _File.model_validate_json(path.read_bytes())
    except OSError as error:
        what = f"{path}: unreadable" if path.exists() else f"{path}: missing"
        expected = '{"labels": [...], "words": [...], "template": "... {text} ..."}'
        raise InputError(describe(what, expected=expected)) from error
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, detail["loc"])) or "content"
        raise InputError(describe(f"{path}: {where}", got=detail["msg"])) from error
    if len(found.words) != len(found.labels):
        expected = f"{len(found.labels)}, one for each label"
        raise InputError(describe(f"{path}: words", got=f"{len(found.words)} of them", expected=expected))
    if len(set(found.labels)) != len(found.labels):
        raise InputError(describe(f"{path}: labels", got=", ".join(found.labels), expected="each label once"))
    return found


def _default_prefix(path: Path, tokenizer: Any, config: Any) -> list[int]:
    """For T5 what the official code feeds, otherwise the id with which the model's own decoder starts."""
    if config.model_type == "t5":
        lacking, prefix = f"a tokenizer without {SENTINEL}", [OFFICIAL_START, tokenizer.token_to_id(SENTINEL)]
    else:
        lacking, prefix = "a config.json without decoder_start_token_id", [config.decoder_start_token_id]
    if None in prefix:
        raise InputError(describe(f"{path}: decoder_input_ids have no default", got=lacking, expected="a list of ids"))
    return prefix


def _first_ids(path: Path, tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The first sub-token of every word; two that begin alike cannot be told apart."""
    ids: list[int] = []
    for word in words:
        pieces = tokenizer.encode(word, add_special_tokens=False).ids
        if not pieces:
            raise InputError(describe(f"{path}: words", got=repr(word), expected="at least one token"))
        if pieces[0] in ids:
            other = words[ids.index(pieces[0])]
            what = f"{path}: {other!r} and {word!r} begin with the same token"
            raise InputError(describe(what, got=repr(tokenizer.id_to_token(pieces[0])), expected="words that differ"))
        ids.append(pieces[0])
    return ids
