"""Labels of the data, by name or number, as the classes of a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.data import Examples, read
from calib.fit import fit_variator
from calib.labels import label_ids
from calib.learners import open_learner
from calib.measuring import known_labels
from calib.settings import FitSettings
from compexport.errors import InputError
from exporter.backbone import load_backbone

SENTIMENT = ["negative", "positive"]
REVERSED = ["Positive", "negative"]  # what a labels.txt says


@pytest.mark.parametrize(
    ("labels", "names", "label_names", "wanted"),
    [
        (["Positive", 0, "1", 1.0], SENTIMENT, None, [1, 0, 1, 1]),
        (["0", 1, 1.0, "negative"], SENTIMENT, REVERSED, [1, 0, 0, 0]),
        (["0", "2"], ["c", "b", "a"], ["a", "b", "c"], [2, 0]),
        (["0", "1"], ["LABEL_0", "LABEL_1"], None, [0, 1]),
        (["0", "good"], ["LABEL_0", "LABEL_1"], ["bad", "good"], [0, 1]),
        (["1", "bad"], ["1", "0"], ["bad", "good"], [0, 1]),
        (["0", "1"], ["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], [1, 0]),
        (["1", 2, "5"], ["1", "2", "3", "4", "5"], None, [0, 1, 4]),
        ([-1, 1, 0], ["-1", "0", "1"], None, [0, 2, 1]),
    ],
)
def test_labels_become_classes(
    labels: list[Any], names: list[str], label_names: list[str] | None, wanted: list[int]
) -> None:
    assert label_ids(labels, names, label_names=label_names) == wanted


@pytest.mark.parametrize(
    ("labels", "names", "label_names", "message"),
    [
        (["0"], SENTIMENT, ["good", "bad"], "got 'good', expected one of negative, positive; the data's labels.txt"),
        (["2"], SENTIMENT, REVERSED, "got '2', expected one of Positive, negative or 0 to 1"),
        (["maybe"], SENTIMENT, None, "got 'maybe', expected one of negative, positive or 0 to 1"),
        (list("01234"), list("12345"), None, "row 1: unknown label: got '0', expected one of 1, 2, 3, 4, 5"),
        (["1"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["bad", "good"], "got 'good', expected one of LABEL_0, LABEL_1"),
    ],
)
def test_labels_that_the_model_does_not_have(
    labels: list[Any], names: list[str], label_names: list[str] | None, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        label_ids(labels, names, "dev.tsv", label_names)
    assert message in str(caught.value) and "dev.tsv: row 1" in str(caught.value)


def folder_of(path: Path, names: list[str]) -> Path:
    """Eight texts, numbered 0, 1, 0, ..., with a labels.txt."""
    rows = "".join(f"text {row}\t{row % 2}\n" for row in range(8))
    for split in ("train", "dev"):
        (path / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    (path / "labels.txt").write_text("\n".join(names))
    return path


def test_a_labels_file_decides_wherever_labels_are_used(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("tiny-bert", "sequence-classification")  # negative, positive
    backbone = load_backbone(folder)
    examples = read(folder_of(tmp_path, REVERSED), "dev")
    assert known_labels(backbone, examples) == [1, 0] * 4
    learner = open_learner(folder, examples)
    assert learner.labels == SENTIMENT  # the head is kept, whatever order the data have
    assert torch.equal(learner.model.classifier.weight, backbone.model.classifier.weight)
    named = Examples(examples.texts, labels=["positive", "negative"] * 4)
    settings = FitSettings(steps=2, batch_size=4, precision="fp32", loss="task")
    ours, theirs = (fit_variator(backbone, one, [2], held_out=one, settings=settings) for one in (examples, named))
    assert ours.record["teacher"] == theirs.record["teacher"]
    weights = theirs.plugins[2].state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.plugins[2].state_dict().items())
    with pytest.raises(InputError, match="unknown label: got 'good', expected one of negative, positive"):
        fit_variator(backbone, read(folder_of(tmp_path, ["good", "bad"]), "dev"), [2], settings=settings)


def test_numbers_beside_other_numbers_get_a_new_head(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("tiny-bert", "sequence-classification"), tmp_path / "numbered")
    text = (folder / "config.json").read_text().replace('"negative"', '"1"').replace('"positive"', '"2"')
    (folder / "config.json").write_text(text)
    assert load_backbone(folder).labels == ["1", "2"]
    assert open_learner(folder, Examples(["x"] * 4, labels=["2", "1"] * 2)).labels == ["1", "2"]
    assert open_learner(folder, Examples(["x"] * 4, labels=["0", "1"] * 2)).labels == ["0", "1"]


def test_what_numbers_mean_is_part_of_the_data() -> None:
    one, other = (Examples(["x"], labels=["0"], label_names=names) for names in (SENTIMENT, REVERSED))
    assert one.sha256() != other.sha256()
