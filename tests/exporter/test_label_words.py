"""``label_words.json``: what is read from it, and one line for each way it can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from compexport.errors import InputError
from exporter.backbone import load_backbone
from exporter.identity import backbone_sha256
from tests.models import LABEL_WORDS


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A private copy of the generating tiny-t5 with label words."""
    return Path(shutil.copytree(tiny("tiny-t5", "label-words"), tmp_path / "model"))


def write(model: Path, **changes: Any) -> None:
    document = {**LABEL_WORDS, **changes}
    kept = {key: value for key, value in document.items() if value is not None}
    (model / "label_words.json").write_text(json.dumps(kept))


def refusal(model: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_backbone(model)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{model}/label_words.json: ")
    return message.removeprefix(f"{model}/label_words.json: ")


def test_words_and_prefix_become_ids(model: Path) -> None:
    backbone = load_backbone(model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    words = backbone.label_words
    assert backbone.task == "label-words" and backbone.labels == LABEL_WORDS["labels"]
    assert words is not None and words.template == LABEL_WORDS["template"]
    assert words.word_ids == [tokenizer.token_to_id("\u2581waste"), tokenizer.token_to_id("\u2581loved")]
    assert words.decoder_input_ids == [2, tokenizer.token_to_id("<extra_id_0>")]


def test_a_prefix_of_ones_own(model: Path) -> None:
    write(model, decoder_input_ids=[0])
    words = load_backbone(model).label_words
    assert words is not None and words.decoder_input_ids == [0]


def test_bart_starts_as_its_decoder_does(tiny: Callable[..., Path]) -> None:
    backbone = load_backbone(tiny("tiny-bart", "label-words"))
    assert backbone.label_words is not None
    assert backbone.label_words.decoder_input_ids == [backbone.config.decoder_start_token_id]


def test_a_word_of_several_tokens_counts_by_its_first(model: Path) -> None:
    write(model, words=["wasteful", "loved"])
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    words = load_backbone(model).label_words
    assert words is not None and words.word_ids[0] == tokenizer.token_to_id("\u2581waste")


def test_words_are_no_part_of_the_backbone(model: Path) -> None:
    """Plugins fitted before the words were written still fit."""
    before = backbone_sha256(model)
    write(model, words=["film", "heart"])
    assert backbone_sha256(model) == before


def test_the_task_can_be_left_to_the_encoder(model: Path) -> None:
    backbone = load_backbone(model, "feature-extraction")
    assert (backbone.task, backbone.labels, backbone.label_words) == ("feature-extraction", [], None)


def test_the_task_without_its_file(model: Path) -> None:
    (model / "label_words.json").unlink()
    assert load_backbone(model).task == "feature-extraction"
    with pytest.raises(InputError, match='label_words.json: missing: expected {"labels": '):
        load_backbone(model, "label-words")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": ["waste"]}, "words: got "),
        ({"words": ["waste", "loved", "film"]}, "words: got 3 of them, expected 2, one for each label"),
        ({"labels": ["good", "good"]}, "labels: got good, good, expected each label once"),
        ({"words": ["waste", "wasteful"]}, "'waste' and 'wasteful' begin with the same token: got '\u2581waste'"),
        ({"words": ["waste", ""]}, "words: got '', expected at least one token"),
        ({"template": "no place"}, "template: got 'no place', expected one {text} and at most one {text_pair}"),
        ({"template": None}, "template: got Field required"),
        ({"labels": None}, "labels: got Field required"),
        ({"decoder_input_ids": []}, "decoder_input_ids: got "),
        ({"decoder_input_ids": [0] * 17}, "decoder_input_ids: got "),
        ({"decoder_input_ids": [-1]}, "decoder_input_ids: got -1, expected ids from 0 to "),
        ({"decoder_input_ids": [10_000]}, "decoder_input_ids: got 10000, expected ids from 0 to "),
        ({"decoder_input_ids": ["2"]}, "decoder_input_ids.0: got "),
        ({"prompt": "x"}, "prompt: got Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_named(model: Path, changes: dict[str, Any], message: str) -> None:
    write(model, **changes)
    assert refusal(model).startswith(message)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_a_corrupt_file(model: Path, text: str) -> None:
    (model / "label_words.json").write_text(text)
    assert refusal(model).startswith("content: got ")


def test_no_default_prefix(model: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace("<extra_id_0>", "<other>"))
    message = "decoder_input_ids have no default: got a tokenizer without <extra_id_0>, expected a list of ids"
    assert refusal(model) == message
    other = Path(shutil.copytree(tiny("tiny-mbart", "label-words"), tmp_path / "mbart"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": None}))
    assert "a config.json without decoder_start_token_id" in refusal(other)
