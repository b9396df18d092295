"""Templates: what is filled where, and what is left of a text that is too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compexport.errors import BundleError, InputError
from engines.manifest import LabelWords
from engines.manifest import Tokenizer as Spec
from engines.prompts import Prompt
from engines.text import TextEncoder
from tests.engines.test_text import save_tokenizer
from tests.models import MODELS

INPUTS = ["input_ids", "attention_mask"]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Any:
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(tokenizer_path))
    found.no_padding()
    found.no_truncation()
    return found


def label_words(template: str) -> LabelWords:
    return LabelWords(words=["a", "it"], word_ids=[4, 9], decoder_input_ids=[0], template=template)


def encoder(path: Path, template: str, max_length: int = 16) -> TextEncoder:
    spec = Spec(path="tokenizer.json", max_length=max_length, pad_id=0, inputs=INPUTS)
    return TextEncoder(path, spec, "label-words", label_words(template))


def tokens(template: str, text: Any, path: Path, max_length: int = 16) -> tuple[list[str], bool]:
    (one,) = encoder(path, template, max_length).encode([text])
    return one.encoding.tokens, one.truncated


@pytest.mark.parametrize(
    ("template", "expected", "spans"),
    [
        ("{text}", "T {} T", [(0, 6)]),
        ("a {text} {b} {text_pair}.", "a T {} T {b} P.", [(2, 8), (13, 14)]),
        ("{text_pair}{text}", "PT {} T", [(1, 7), (0, 1)]),
    ],
)
def test_fill(template: str, expected: str, spans: list[tuple[int, int]]) -> None:
    """Braces in a text, or around other words of a template, stand for themselves."""
    filled, found = Prompt(template).fill("T {} T", "P")
    assert filled == expected
    assert found == spans


@pytest.mark.parametrize(
    "template", ["", "no place", "{text} {text}", "{text} {text_pair} {text_pair}", "{text_pair}", "{ text }"]
)
def test_a_template_needs_its_places(template: str) -> None:
    with pytest.raises(ValueError, match=r"needs one \{text\} and at most one \{text_pair\}"):
        label_words(template)


def test_a_short_text_is_tokenised_as_the_filled_template(tokenizer_path: Path) -> None:
    found = tokens("the {text} who made it ?", "fine film", tokenizer_path)
    assert found == (["[CLS]", "the", "fine", "film", "who", "made", "it", "?", "[SEP]"], False)


def test_a_long_text_is_cut_and_the_template_kept(tokenizer_path: Path) -> None:
    found = tokens("the {text} who made it ?", "quick brown fox film fine", tokenizer_path, max_length=10)
    assert found == (["[CLS]", "the", "quick", "brown", "fox", "who", "made", "it", "?", "[SEP]"], True)


def test_of_two_texts_the_longer_is_cut_first(tokenizer_path: Path) -> None:
    pair = ("a fine", "quick brown fox film fine")
    assert tokens("{text} who {text_pair} ?", pair, tokenizer_path, max_length=8)[0] == (
        ["[CLS]", "a", "fine", "who", "quick", "brown", "?", "[SEP]"]
    )
    assert tokens("{text} who {text_pair} ?", pair, tokenizer_path, max_length=6)[0] == (
        ["[CLS]", "a", "who", "quick", "?", "[SEP]"]
    )


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_text_fits_and_keeps_the_template(data: st.DataObject, tokenizer: Any) -> None:
    words = st.lists(st.sampled_from(["a", "film", "xyz", "?", "the-quick"]), min_size=1, max_size=20).map(" ".join)
    text, pair, room = data.draw(words), data.draw(words), data.draw(st.integers(7, 30))
    prompt = Prompt("who {text} made {text_pair} it")
    (one,) = prompt.encode(tokenizer, [(text, pair)], room)
    whole = tokenizer.encode(prompt.fill(text, pair)[0])
    assert len(one.encoding) <= room
    assert one.truncated == (len(whole) > room)
    assert one.truncated or one.encoding.ids == whole.ids
    left = [token for token in one.encoding.tokens if token in {"who", "made", "it", "[CLS]", "[SEP]"}]
    assert left == ["[CLS]", "who", "made", "it", "[SEP]"]
    # No more is cut than must be: the last cut word may have had up to three tokens.
    assert not one.truncated or len(one.encoding) >= room - 2


def test_markers_in_a_text_are_cut_like_words(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    MODELS["tiny-t5"].tokenizer().save(str(path))
    found, truncated = tokens("the {text} it", "</s> <extra_id_0> " * 20 + "film", path, max_length=8)
    assert truncated and len(found) <= 8
    assert found[:3] == ["\u2581the", "\u2581", "</s>"] and found[-2:] == ["\u2581it", "</s>"]


def test_a_template_longer_than_the_model_is_refused(tokenizer_path: Path) -> None:
    with pytest.raises(BundleError, match=r"max_length leaves no room beside the template's 7 tokens: got 7"):
        encoder(tokenizer_path, "who made it ? the {text}", max_length=7)
    assert len(encoder(tokenizer_path, "who made it ? the {text}", max_length=8).encode(["a film"])[0]) == 8


def test_texts_and_pairs_must_be_what_the_template_reads(tokenizer_path: Path) -> None:
    with pytest.raises(InputError, match=r"text 1 \(counted from 0\) is a pair: got the \{text\}, expected one text"):
        encoder(tokenizer_path, "the {text}").encode(["a", ("a", "film")])
    with pytest.raises(InputError, match=r"text 0 \(counted from 0\) is single: got .*, expected a pair"):
        encoder(tokenizer_path, "{text} or {text_pair}").encode(["a"])


@pytest.mark.parametrize("text", ["", "  ", "\x00\x7f"])
def test_a_text_without_a_token_is_refused(tmp_path: Path, text: str) -> None:
    """Whatever the template says around it; BERT's tokenizer drops control characters."""
    path = tmp_path / "tokenizer.json"
    MODELS["tiny-bert"].tokenizer().save(str(path))
    with pytest.raises(InputError, match=r"text 1 \(counted from 0\) is empty"):
        encoder(path, "the {text} film").encode(["a", text])


def test_too_long_without_truncation(tokenizer_path: Path) -> None:
    with pytest.raises(InputError, match="text 0 of 1 .* is longer than the model's 8 tokens"):
        encoder(tokenizer_path, "the {text}", max_length=8).encode(["a film " * 9], truncate=False)


def test_bad_unicode_is_one_line(tokenizer_path: Path) -> None:
    with pytest.raises(InputError, match=r"text 1 \(counted from 0\) is not valid Unicode"):
        encoder(tokenizer_path, "the {text}").encode(["a", "b\ud800"])
