"""Fine-tuning tiny models: which labels and heads they get, what is learnt, and what is written."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.data import Examples
from calib.finetune import RECORD, FinetuneSettings, accuracy, finetune, require_place, run_description
from calib.fit import fit_variator
from calib.labels import class_names, label_ids
from calib.learners import open_learner
from calib.settings import FitSettings
from compexport.errors import InputError
from exporter.backbone import load_backbone
from tests.models import TEXTS

QUICK = FinetuneSettings(steps=2, batch_size=4, max_length=24, precision="fp32")
# The first word tells the label.
TOLD = [f"{('good', 'bad')[n % 2]} {TEXTS[n % 8]} {n}" for n in range(64)]
LABELS = [("good", "bad")[n % 2] for n in range(64)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-roberta", "tiny-distilbert", "tiny-electra"])
def test_every_host_becomes_a_classifier(tiny: Callable[..., Path], tmp_path: Path, name: str) -> None:
    examples = Examples(TOLD, labels=LABELS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = finetune(open_learner(tiny(name), examples), examples, examples.take(range(9)), settings=QUICK)
    assert not caught
    done.save(tmp_path / "out")
    backbone = load_backbone(tmp_path / "out")
    assert (backbone.task, backbone.labels) == ("sequence-classification", ["bad", "good"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"} and config["label2id"] == {"bad": 0, "good": 1}
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", RECORD, "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    # What was measured is what was written.
    again = open_learner(tmp_path / "out", examples)
    wanted = label_ids(LABELS[:9], again.labels)
    assert accuracy(again.eval(), examples.take(range(9)), wanted, QUICK) == done.record["value"]
    record = json.loads((tmp_path / "out" / RECORD).read_text())["record"]
    assert record["steps"] == 2 and record["held_out"] == 9


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-t5-gated", "tiny-bart"])
def test_label_words_are_learnt(tiny: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = tiny(name, "label-words")
    labels = ["negative" if label == "bad" else "positive" for label in LABELS]
    examples = Examples(TOLD, labels=labels)
    settings = FinetuneSettings(steps=80, batch_size=16, learning_rate=5e-3, max_length=80, precision="fp32")
    done = finetune(open_learner(folder, examples), examples, examples, settings=settings)
    assert done.record["labels"] == ["negative", "positive"] and done.record["value"] > 0.9
    done.save(tmp_path / "out")
    backbone = load_backbone(tmp_path / "out")
    assert backbone.task == "label-words" and backbone.label_words == load_backbone(folder).label_words
    # The written model answers as the one that was measured, and takes plugins that learn from its answers.
    again = open_learner(tmp_path / "out", examples).eval()
    assert accuracy(again, examples, label_ids(labels, again.labels), settings) == done.record["value"]
    fit = FitSettings(steps=2, batch_size=8, max_length=80, loss="task-hidden", precision="fp32")
    fitted = fit_variator(backbone, examples, [2], settings=fit)
    assert fitted.record["metric"] == "accuracy" and fitted.record["teacher"] > 0.8


def test_an_encoder_that_cannot_classify(tiny: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="cannot be fine-tuned: got t5, expected label_words.json in it"):
        open_learner(tiny("tiny-t5"), Examples(TOLD, labels=LABELS))


def test_labels_are_learnt(tiny: Callable[..., Path]) -> None:
    examples = Examples(TOLD, labels=LABELS)
    settings = FinetuneSettings(steps=60, batch_size=16, learning_rate=5e-3, max_length=24, precision="fp32")
    done = finetune(open_learner(tiny(), examples), examples, examples, settings=settings)
    assert done.record["value"] > 0.9 and done.record["majority"] == 0.5


def test_a_seed_repeats_a_run(tiny: Callable[..., Path]) -> None:
    examples = Examples(TOLD, labels=LABELS)
    before = torch.random.get_rng_state()
    first, second, other = (
        finetune(open_learner(tiny(), examples, seed), examples, settings=replace(QUICK, seed=seed))
        for seed in (0, 0, 1)
    )
    ours, same, different = (one.learner.model.state_dict() for one in (first, second, other))
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert not torch.equal(ours["classifier.weight"], different["classifier.weight"])
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.record["value"] is None and first.record["majority"] is None


def test_a_head_is_kept_where_its_labels_are_those_of_the_data(tiny: Callable[..., Path]) -> None:
    folder = tiny("tiny-bert", "sequence-classification")  # negative, positive
    weight = load_backbone(folder).model.classifier.weight
    for labels in (["Positive", "negative"], ["0", "1"], [1, 0.0]):
        learner = open_learner(folder, Examples(TEXTS, labels=labels * 4))
        assert learner.labels == ["negative", "positive"] and torch.equal(learner.model.classifier.weight, weight)
    for labels in (["good", "bad"], ["0", "1", "2", "0"]):
        learner = open_learner(folder, Examples(TEXTS, labels=(labels * 4)[:8]), seed=1)  # the folder's is of seed 0
        assert learner.labels == sorted(set(labels))
        assert not torch.equal(learner.model.classifier.weight[:2], weight)
    other_names = Examples(TEXTS, labels=["0", "1"] * 4, label_names=["sour", "sweet"])
    assert open_learner(folder, other_names).labels == ["sour", "sweet"]


@pytest.mark.parametrize(
    ("labels", "names", "wanted"),
    [
        (["b", "A", "b", "B "], None, ["A", "b"]),
        (["10", "9", "10", "9"], None, ["9", "10"]),
        ([2.0, 1, 2, 1], None, ["1", "2"]),
        ([True, False, True, False], None, ["False", "True"]),
        (["1", 0, "World", 1], ["World", "Sports", "Sci"], ["World", "Sports", "Sci"]),
    ],
)
def test_classes_are_found_in_the_data(labels: list[Any], names: list[str] | None, wanted: list[str]) -> None:
    assert class_names(Examples(["x"] * 4, labels=labels, label_names=names)) == wanted


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (None, None, "no label column recognised"),
        (["a"] * 8, None, "labels: got only a, expected at least two classes"),
        ([0.5] * 8, None, "row 1: label: got 0.5, expected one class"),
        ([["PER"]] * 8, None, "row 1: label: got ['PER'], expected one class"),
        ([float("nan")] * 8, None, "row 1: label: got nan"),
        (list("abcdefgh"), None, "8 distinct ones (a, b, c, d, e, ...) in 8 rows, expected few classes"),
        (["0", "5"] * 4, ["World", "Sports"], "row 2: unknown label: got '5', expected one of World, Sports or 0 to 1"),
    ],
)
def test_labels_that_are_no_classes(labels: list[Any] | None, names: list[str] | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        class_names(Examples(["x"] * 8, labels=labels, label_names=names))
    assert message in str(caught.value)


def test_a_label_that_only_dev_has(tiny: Callable[..., Path]) -> None:
    examples = Examples(TOLD, labels=LABELS)
    dev = Examples(["x"], labels=["ugly"], origin="dev.tsv")
    with pytest.raises(InputError, match="dev.tsv: row 1: unknown label: got 'ugly', expected one of bad, good"):
        finetune(open_learner(tiny(), examples), examples, dev, settings=QUICK)
    with pytest.raises(InputError, match="no label column"):
        finetune(open_learner(tiny(), examples), examples, Examples(["x"]), settings=QUICK)


def test_a_write_that_fails_leaves_the_older_model(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = Examples(TOLD, labels=LABELS)
    done = finetune(open_learner(tiny(), examples), examples, settings=QUICK)
    done.save(tmp_path / "out")
    kept = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(type(done.learner), "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        done.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == kept
    require_place(tmp_path / "out", tiny())


def test_what_else_is_in_the_folder_is_never_lost(tiny: Callable[..., Path], tmp_path: Path) -> None:
    examples = Examples(TOLD, labels=LABELS)
    done = finetune(open_learner(tiny(), examples), examples, settings=QUICK)
    out = tmp_path / "out"
    done.save(out)
    done.save(out)
    (out / "bundle").mkdir()
    (out / "bundle" / "manifest.json").write_text("{}")
    (out / "notes.txt").write_text("years of work")
    message = "out: holds more than a fine-tuned model: got bundle/manifest.json, notes.txt; move them away, or"
    for write in (lambda: require_place(out, tiny()), lambda: done.save(out)):
        with pytest.raises(InputError, match=message):
            write()
    assert (out / "notes.txt").read_text() == "years of work"
    shutil.rmtree(out / "bundle")
    (out / "notes.txt").unlink()
    require_place(out, tiny())
    (out / RECORD).write_text("{}")
    with pytest.raises(InputError, match="finetune.json: does not say what was written: got KeyError"):
        require_place(out, tiny())


def test_a_run_is_another_where_labels_mean_something_else(tiny: Callable[..., Path]) -> None:
    numbered = ["0", "1"] * (len(TOLD) // 2)
    runs = []
    for names in (["sour", "sweet"], ["sweet", "sour"]):
        examples = Examples(TOLD, labels=numbered, label_names=names)
        runs.append(run_description(QUICK, open_learner(tiny(), examples), examples))
    assert [name for name in runs[0] if runs[0][name] != runs[1][name]] == ["labels", "data"]
