"""A generating model as a classifier, from its folder to answers: build, bench, evaluate, run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.compexport.conftest import TEXTS, labelled_texts
from tests.models import LABEL_WORDS, MAX_LENGTH

Cli = Callable[..., Any]
NAMES = [f"variator-r{ratio}-fp32" for ratio in (1, 2, 4, 8)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> tuple[Path, Path]:
    """A copy of the generating tiny-t5 and its bundle of ratios 1, 2, 4, 8. Do not write into them."""
    from compexport import api

    folder = tmp_path_factory.mktemp("words")
    model = Path(shutil.copytree(tiny("tiny-t5", "label-words"), folder / "model"))
    report = api.build_document(model, ratios=[2, 4, 8], output=folder / "bundle", untrained=True)
    assert all(row["parity_max_abs"] <= 1e-4 for row in report["variants"])
    return model, folder / "bundle"


@pytest.fixture
def bundle(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A private copy at ``./bundle`` of the current folder."""
    return Path(shutil.copytree(made[1], tmp_path / "bundle"))


def test_the_manifest_says_how_texts_are_put(cli: Cli, made: tuple[Path, Path], bundle: Path) -> None:
    manifest = cli("inspect", "--json").document
    tokenizer = Tokenizer.from_file(str(made[0] / "tokenizer.json"))
    assert (manifest["task"], manifest["labels"]) == ("label-words", LABEL_WORDS["labels"])
    assert manifest["backbone"]["architecture"] == "T5ForConditionalGeneration"
    assert manifest["label_words"] == {
        "words": LABEL_WORDS["words"],
        "word_ids": [tokenizer.token_to_id("\u2581" + word.strip()) for word in LABEL_WORDS["words"]],
        "decoder_input_ids": [2, tokenizer.token_to_id("<extra_id_0>")],
        "template": LABEL_WORDS["template"],
    }
    assert [tensor["name"] for tensor in manifest["graphs"]["r4"]["inputs"]] == ["input_ids", "attention_mask"]
    assert manifest["graphs"]["r4"]["outputs"][0]["shape"][1:] == [2]


def test_run_answers_as_hugging_face(cli: Cli, made: tuple[Path, Path], bundle: Path) -> None:
    """Ratio 1 against the generating model itself, fed with the filled template."""
    from transformers import T5ForConditionalGeneration

    texts = [TEXTS[0], "a {text} of long words " * 40]
    document = cli("run", *(part for text in texts for part in ("--text", text)), "--ratio", "1", "--json").document
    assert document["truncated"] == [False, True]
    model = T5ForConditionalGeneration.from_pretrained(made[0]).eval()
    tokenizer = Tokenizer.from_file(str(made[0] / "tokenizer.json"))
    ids = [tokenizer.token_to_id("\u2581" + word.strip()) for word in LABEL_WORDS["words"]]
    whole = tokenizer.encode(LABEL_WORDS["template"].replace("{text}", texts[0])).ids
    long = tokenizer.encode(LABEL_WORDS["template"].replace("{text}", texts[1])).ids
    tail = tokenizer.encode(LABEL_WORDS["template"].split("{text} ")[1]).ids
    assert len(long) > MAX_LENGTH and long[-len(tail) :] == tail
    cut = long[: MAX_LENGTH - len(tail)] + tail
    for tokens, answer in zip([whole, cut], document["outputs"], strict=True):
        prefix = torch.tensor([[2, tokenizer.token_to_id("<extra_id_0>")]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), decoder_input_ids=prefix).logits[0, -1, ids]
        expected = dict(zip(LABEL_WORDS["labels"], logits.softmax(0).tolist(), strict=True))
        assert answer["scores"] == pytest.approx(expected, abs=1e-4)
        assert answer["label"] == max(expected, key=lambda label: expected[label])


def test_bench_evaluate_and_budgets(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    benched = cli("bench", "--batch", "1", "--length", "32", "--min-runs", "3", "--json").document
    assert {row["variant"] for row in benched["rows"]} == set(NAMES)
    evaluated = cli("evaluate", "--data", labelled_texts(tmp_path), "--json").document
    assert evaluated["metric"] == "accuracy" and [row["variant"] for row in evaluated["variants"]] == NAMES
    done = cli("run", "--text", TEXTS[0], "--budget-ms", "1000", "--json").document
    assert done["outputs"][0]["label"] in LABEL_WORDS["labels"]


def test_another_template_is_another_bundle(cli: Cli, made: tuple[Path, Path], bundle: Path, tmp_path: Path) -> None:
    """The graphs stay the same, but not what the manifest says, nor measured quality."""
    cli("evaluate", "--data", labelled_texts(tmp_path), "--json")
    assert (bundle / "quality.json").exists()
    model = Path(shutil.copytree(made[0], tmp_path / "model"))
    (model / "label_words.json").write_text(json.dumps({**LABEL_WORDS, "template": "{text} and {text_pair}"}))
    assert cli("build", model, "--ratio", "2", "--untrained", "--json").code == 0
    assert cli("inspect", "--json").document["label_words"]["template"] == "{text} and {text_pair}"
    assert not (bundle / "quality.json").exists()
    done = cli("run", "--text", TEXTS[0], "--json")
    assert done.code == 2 and "text 0 (counted from 0) is single" in done.error
    assert cli("run", "--text", TEXTS[0], "--text-pair", TEXTS[1], "--json").code == 0
