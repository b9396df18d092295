"""Text in: the tokenizer of a bundle turns texts and pairs into int64 feeds [B, S], padded on the right.

Texts that are to be written on are padded on the left, so that what follows stands next to them, and too long ones lose
their beginning.

The `tokenizers` package is imported when a ``TextEncoder`` is made, not with this module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compexport.errors import BundleError, CompexportError, DependencyError, InputError, describe
from engines.manifest import GENERATION, TEXT2TEXT, Generation, LabelWords
from engines.manifest import Tokenizer as TokenizerSpec
from engines.prompts import Prompt

Text = str | tuple[str, str] | list[str]  # a list is a pair that came through JSON
Ids = npt.NDArray[np.int64]

QUESTION_ANSWERING = "question-answering"
KNOWN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedText:
    """One text or pair as tokens. ``encoding`` is a ``tokenizers.Encoding``; ``truncated``: tokens were dropped."""

    text: str
    pair: str | None
    encoding: Any
    truncated: bool

    def __len__(self) -> int:
        """Number of tokens, special ones included."""
        return len(self.encoding)

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Per token, start and end character in the text it came from; (0, 0) for special tokens."""
        return list(self.encoding.offsets)

    @property
    def sequence_ids(self) -> list[int | None]:
        """Per token, 0 for the text, 1 for its pair, None for special tokens."""
        return list(self.encoding.sequence_ids)

    def source(self, sequence_id: int) -> str:
        """The text that tokens with this sequence id, and their offsets, belong to."""
        return self.pair if sequence_id == 1 and self.pair is not None else self.text


class TextEncoder:
    """A bundle's tokenizer. Its settings are fixed when it is made, so threads may share it."""

    def __init__(
        self,
        path: Path,
        spec: TokenizerSpec,
        task: str,
        words: LabelWords | None = None,
        generation: Generation | None = None,
        shortest: int = 1,
    ) -> None:
        """``path``: the ``tokenizer.json``. Question answering cuts only the context, other tasks the longer text.

        ``words``: every text is put into their template first, and only the text is cut. ``generation``: where it has
        a token to begin with, a text may be empty. ``shortest``: tokens that the engines need, by padding.

        Raises BundleError for a file that is no tokenizer, an input it cannot feed, or a limit too small for any
        text; DependencyError when `tokenizers` is not installed.
        """
        unknown = [name for name in spec.inputs if name not in KNOWN_INPUTS]
        if unknown or "input_ids" not in spec.inputs:
            expected = "input_ids, attention_mask and perhaps token_type_ids"
            raise BundleError(describe("tokenizer inputs", got=", ".join(spec.inputs) or "none", expected=expected))
        self.spec = spec
        self._shortest = shortest
        self.answers_questions = task == QUESTION_ANSWERING
        self.writes = task == GENERATION
        self.writes_another = task == TEXT2TEXT
        self._tokenizer = _tokenizer_from_file(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._prompt = None if words is None else Prompt(words.template)
        special = self._overhead()
        if spec.max_length <= special:
            what = f"tokenizer max_length leaves no room beside {special} special tokens"
            if self._prompt is not None:
                what = f"tokenizer max_length leaves no room beside the template's {special} tokens"
            raise BundleError(describe(what, got=spec.max_length, hint="build the bundle again"))
        begins = None if generation is None else generation.bos_id
        self._beginning = "" if begins is None else self._tokenizer.id_to_token(begins) or ""
        if self._prompt is None and not self.writes:
            strategy = "only_second" if self.answers_questions else "longest_first"
            self._tokenizer.enable_truncation(spec.max_length, stride=0, strategy=strategy, direction="right")

    def encode(
        self, texts: Sequence[Text], *, truncate: bool = True, room: int | None = None, warn: bool = True
    ) -> list[EncodedText]:
        """Tokenise, in the order given. A text beyond ``max_length`` tokens is cut, with a logged warning (``warn``).

        ``room``: fewer tokens than that, for texts that are to be written on.

        Raises InputError that names the text: empty, only spaces, or nothing the tokenizer can see; not a string or
        pair of strings; not valid Unicode; a single text for question answering or a template that reads pairs, and a
        pair for one that does not, or where texts are written; too long with ``truncate=False``.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise InputError(
                describe("texts have the wrong type", got=type(texts).__name__, expected="a list of texts")
            )
        if not texts:
            raise InputError(describe("no text was given", expected="at least one"))
        items = [self._checked(number, text) for number, text in enumerate(texts)]
        limit = min(self.spec.max_length, room or self.spec.max_length)
        if self.writes:
            encoded = self._begun(items, limit)
        else:
            encoded = self._prompted(items) if self._prompt is not None else self._plain(items)
        too_long = [number for number, one in enumerate(encoded) if one.truncated]
        if too_long and (warn or not truncate):
            self._report_too_long(too_long, len(encoded), limit, truncate)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """The text that tokens stand for, special ones left out."""
        return str(self._tokenizer.decode(list(ids)))

    def feeds(self, encoded: Sequence[EncodedText]) -> dict[str, Ids]:
        """The graph inputs named in the manifest, int64 [B, S], S the longest of these texts or what engines need."""
        shape = (len(encoded), max(self._shortest, *map(len, encoded)))
        feeds = {}
        for name in self.spec.inputs:
            feeds[name] = np.full(shape, self._padding(name), dtype=np.int64)
            for row, one in zip(feeds[name], encoded, strict=True):
                place = slice(shape[1] - len(one), None) if self.writes else slice(len(one))
                row[place] = _values(name, one)
        return feeds

    def dummy_feeds(self, batch: int, length: int) -> dict[str, Ids]:
        """Feeds of valid but meaningless ids, int64 [batch, length], to warm up an engine."""
        values = {"input_ids": self.spec.pad_id, "attention_mask": 1, "token_type_ids": 0}
        return {name: np.full((batch, length), values[name], dtype=np.int64) for name in self.spec.inputs}

    def _padding(self, name: str) -> int:
        return {"input_ids": self.spec.pad_id, "attention_mask": 0, "token_type_ids": self.spec.pad_type_id}[name]

    def _checked(self, number: int, text: Text) -> str | tuple[str, str]:
        """A string or a pair of strings, each with something in it."""
        parts = [text] if isinstance(text, str) else text
        is_pair = isinstance(text, tuple | list) and len(text) == 2
        if not (isinstance(text, str) or is_pair) or not all(isinstance(part, str) for part in parts):
            what, expected = f"{_which(number)} has the wrong type", "a string or a pair of strings"
            raise InputError(describe(what, got=type(text).__name__, expected=expected))
        if self.answers_questions and len(parts) == 1:
            raise InputError(describe(f"{_which(number)} is single", expected="a pair: the question and its context"))
        if self._prompt is not None and self._prompt.reads_pairs != (len(parts) == 2):
            what = f"{_which(number)} is {'a pair' if len(parts) == 2 else 'single'}"
            expected = f"{'a pair' if self._prompt.reads_pairs else 'one text'}, as the template"
            raise InputError(describe(what, got=self._prompt.template, expected=expected))
        if (self.writes or self.writes_another) and len(parts) == 2:
            expected = "one text, to be written on" if self.writes else "one text, of which another is written"
            raise InputError(describe(f"{_which(number)} is a pair", expected=expected))
        if self.writes and self._beginning and parts[0] == "":
            return self._beginning
        if not all(part.strip() for part in parts):
            raise InputError(describe(f"{_which(number)} is empty", expected="at least one visible character"))
        return parts[0] if len(parts) == 1 else (parts[0], parts[1])

    def _overhead(self) -> int:
        """Tokens that are there whatever the text is."""
        if self._prompt is None:
            return int(self._tokenizer.num_special_tokens_to_add(self.answers_questions))
        return len(self._tokenizer.encode(self._prompt.fill("", "")[0]))

    def _plain(self, items: list[str | tuple[str, str]]) -> list[EncodedText]:
        with self._telling(items):
            encodings = self._tokenizer.encode_batch(items)
        found = [
            EncodedText(*_split(item), encoding, bool(encoding.overflowing))
            for item, encoding in zip(items, encodings, strict=True)
        ]
        for number, one in enumerate(found):
            if all(one.encoding.special_tokens_mask):
                raise _blank(number)
        return found

    def _begun(self, items: list[str | tuple[str, str]], limit: int) -> list[EncodedText]:
        """Texts to be written on: a long one keeps its end, and the special tokens around it."""
        with self._telling(items):
            encodings = self._tokenizer.encode_batch(items, add_special_tokens=False)
            room, found = limit - self._overhead(), []
            for number, (item, encoding) in enumerate(zip(items, encodings, strict=True)):
                if not len(encoding):
                    raise _blank(number)
                cut = len(encoding) > room
                if cut:
                    encoding.truncate(max(room, 1), direction="left")
                found.append(EncodedText(str(item), None, self._tokenizer.post_process(encoding), cut))
        return found

    def _prompted(self, items: list[str | tuple[str, str]]) -> list[EncodedText]:
        assert self._prompt is not None
        texts = [_split(item) for item in items]
        with self._telling(items):
            prompted = self._prompt.encode(self._tokenizer, texts, self.spec.max_length)
        for number, one in enumerate(prompted):
            if not one.visible:
                raise _blank(number)
        return [EncodedText(*text, one.encoding, one.truncated) for text, one in zip(texts, prompted, strict=True)]

    @contextmanager
    def _telling(self, items: list[str | tuple[str, str]]) -> Iterator[None]:
        """Errors of the tokenizer, said in one line."""
        try:
            yield
        except CompexportError:
            raise
        except (TypeError, UnicodeError) as error:  # lone surrogates cannot become UTF-8
            bad = [str(number) for number, item in enumerate(items) if not _is_unicode(item)]
            where = _which(", ".join(bad)) if bad else "a text"
            raise InputError(describe(f"{where} is not valid Unicode", hint="remove lone surrogates")) from error
        except Exception as error:  # `tokenizers` raises bare Exception; the one cause left is an uncuttable question
            limit = f"at most {self.spec.max_length} tokens"
            raise InputError(describe(f"text cannot be tokenised ({error})", expected=limit)) from error

    def _report_too_long(self, numbers: list[int], count: int, limit: int, truncate: bool) -> None:
        named = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        whose = f"the model's {limit}" if limit == self.spec.max_length else f"the {limit} that leave room for the new"
        what = f"text {named} of {count} (counted from 0) is longer than {whose} tokens"
        if not truncate:
            raise InputError(describe(what, hint="shorten it or allow truncation"))
        _log.warning("%s; the rest was cut off", what)


def _tokenizer_from_file(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DependencyError(describe("tokenizers is not installed", hint="run `pip install tokenizers`")) from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception for everything it cannot parse
        what = f"{path.name} cannot be read as a tokenizer ({str(error).splitlines()[0]})"
        raise BundleError(describe(what, hint="build the bundle again")) from error


def _which(number: object) -> str:
    return f"text {number} (counted from 0)"


def _split(item: str | tuple[str, str]) -> tuple[str, str | None]:
    return (item, None) if isinstance(item, str) else item


def _values(name: str, one: EncodedText) -> list[int]:
    if name == "attention_mask":
        return [1] * len(one)
    return list(one.encoding.ids if name == "input_ids" else one.encoding.type_ids)


def _blank(number: int) -> InputError:
    """Control characters alone, for example, pass for text but leave no token."""
    return InputError(describe(f"{_which(number)} is empty to the tokenizer", expected="at least one token"))


def _is_unicode(item: str | tuple[str, str]) -> bool:
    try:
        "".join(item).encode()
    except UnicodeEncodeError:
        return False
    return True
