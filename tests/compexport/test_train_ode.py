"""``compexport train ode`` from the command line: each kind of question, whole, killed and resumed, and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.backbone import load_backbone
from exporter.checkpoint import find_checkpoint
from exporter.methods.ode import Stepping, facts_of
from exporter.methods.ode_checkpoint import load_exits
from exporter.methods.ode_stepping import described_stepping
from tests import models
from tests.compexport.runs import Whole, killed_once_saved, same

Cli = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--batch-size", 8, "--precision", "fp32", "--learning-rate", 2e-3]


def plain_texts(folder: Path) -> Path:
    path = folder / "texts.txt"
    path.write_text("\n".join(models.TEXTS * 6) + "\n")
    return path


def test_a_classifier_with_exits(cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    command = ["train", "ode", tiny("tiny-albert"), "--data", data, *QUICK, "--form", "sublayer", "--exit-heads"]
    done = cli(*command, "--ratio", "2,3", "--steps", 12, "-o", "out", "--json")
    assert done.code == 0, done.err
    document = done.document
    assert set(document) >= {"method", "output", "ratios", "extra_params", "extra_params_share", "steps", "seconds",
                             "metric", "teacher", "student", "dropped", "forms", "exits", "n", "form"}  # fmt: skip
    assert document["labels"] == ["bad", "good", "neither"] and document["n"] == {"2": 3, "3": 2}
    assert document["iterations"] == 6 and document["fewest_steps"] == 3 and document["held_out"] == 12
    assert list(document["stages"]) == ["train", "exits-r2", "exits-r3"] and document["extra_params"]["2"] > 0
    assert document["exits"]["2"][-1] == document["student"]["2"] and len(document["exits"]["2"]) == 3

    found, backbone = find_checkpoint(tmp_path / "out", "ode"), load_backbone(tmp_path / "out")
    assert found is not None and backbone.task == "sequence-classification"
    assert described_stepping(found, (6,), 2) == Stepping("sublayer", ((2.0, 2.0, 2.0),))
    heads = load_exits(found, facts_of(backbone), 3, 2)
    assert heads is not None and list(heads.exits) == ["1", "2"]
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize(
    ("name", "task", "options", "objective"),
    [
        ("tiny-albert", "feature-extraction", [], "mlm"),
        ("tiny-albert", "feature-extraction", ["--from-scratch", "--form", "block"], "mlm"),
        ("tiny-gpt2-shared", "text-generation", [], "lm"),
        ("tiny-gpt2-shared", "text-generation", ["--from-scratch", "--plain"], "lm"),
    ],
)
def test_texts_without_labels(
    cli: Cli,
    tiny: Callable[..., Path],
    tmp_path: Path,
    name: str,
    task: str,
    options: list[str],
    objective: str,
) -> None:
    command = ["train", "ode", tiny(name, task), "--data", plain_texts(tmp_path), *QUICK, *options]
    done = cli(*command, "--steps", 6, "-o", "out", "--json")
    assert done.code == 0, done.err
    assert done.document["objective"] == objective and done.document["ratios"] == [2, 3]
    assert set(done.document["loss"]) == {"1", "2", "3"}
    # What was written is read again, and goes on being trained.
    again = cli(*command[:2], "out", *command[3:5], *QUICK, "--steps", 2, "--ratio", 2, "-o", "again", "--json")
    assert again.code == 0, again.err
    assert again.document["objective"] == objective
    assert load_backbone(tmp_path / "again").task == task


def test_what_is_learnt_shows_in_fewer_steps_too(cli: Cli, tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("tiny-gpt2-shared", "text-generation")
    command = ["train", "ode", model, "--data", plain_texts(tmp_path), *QUICK, "--ratio", "2,3"]
    documents = [cli(*command, "--steps", steps, "-o", f"out{steps}", "--json").document for steps in (1, 40)]
    assert documents[0]["majority"] == documents[1]["majority"] and not documents[0]["learnt"]
    before, after = (document["loss"] for document in documents)
    assert all(after[ratio] < before[ratio] - 0.5 for ratio in ("1", "2", "3")), (before, after)


def test_an_unshared_model_is_made_to_share(cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    source = tiny("tiny-bert", "sequence-classification")
    (data / "labels.txt").write_text("negative\npositive\n")
    for name in ("train.tsv", "dev.tsv"):
        rows = [line for line in (data / name).read_text().splitlines() if not line.endswith("neither")]
        text = "\n".join(row.replace("\tgood", "\t1").replace("\tbad", "\t0") for row in rows)
        (data / name).write_text(text + "\n")
    command = ["train", "ode", source, "--data", data, *QUICK, "--share", 1, "--iterations", 4]
    done = cli(*command, "--steps", 8, "-o", "out", "--json")
    assert done.code == 0, done.err
    assert list(done.document["stages"]) == ["share", "train"] and done.document["ratios"] == [2, 4]
    made = load_backbone(tmp_path / "out")
    assert made.config.model_type == "albert" and facts_of(made).groups == (4,)
    assert made.labels == ["negative", "positive"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path], kept_data: Path) -> Whole:
    """A run that nobody kills."""
    options = ["--share", 1, "--iterations", 4, "--ratio", "2,4", "--exit-heads", "--steps", 30, "--save-every", 4]
    command = ["train", "ode", tiny(), "--data", kept_data, *QUICK, *options]
    return Whole.run(command, tmp_path_factory.mktemp("whole") / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["share", "train", "exits-r2"])
def test_a_killed_run_goes_on(cli: Cli, whole: Whole, tmp_path: Path, stage: str) -> None:
    command = whole.command
    killed_once_saved(tmp_path, "killed", *command, stage=stage)
    refused = cli(*command, "-o", "killed")
    assert refused.code == 2 and "killed.unfinished: holds an unfinished run" in refused.error
    other = cli(*command, "-o", "killed", "--resume", "--distance-weight", 2)
    assert other.code == 2 and "had other settings: got distance_weight 2.0" in other.error
    done = cli(*command, "-o", "killed", "--resume", "--json")
    assert done.code == 0 and done.document["exits"] == whole.document["exits"]
    assert done.document["steps"] == whole.document["steps"] and next(iter(done.document["stages"])) == "share"
    for file in ("model.safetensors", "ode-r2.safetensors"):
        assert same(tmp_path / "killed" / file, whole.output / file)
    assert not (tmp_path / "killed.unfinished").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny-albert", ["--ratio", "5"], "no whole number of steps at ratio 5: got 6 iterations"),
        ("tiny-albert", ["--ratio", "1"], "--ratio: got 1, expected ratios above 1"),
        ("tiny-albert", ["--objective", "lm"], "objective: got lm, expected classification or mlm: it is an encoder"),
        ("tiny-albert", ["--objective", "mlm", "--exit-heads"], "--exit-heads: got mlm, expected classification"),
        ("tiny-albert", ["--ratio", "6", "--exit-heads"], "--exit-heads: got one step at every ratio"),
        ("tiny-albert", ["--form", "euler"], "form: got euler, expected one of block, sublayer, auto"),
        ("tiny-albert", ["--fewest-steps", "7"], "fewest steps: got 7, expected 1 to 6"),
        ("tiny-albert", ["--joint"], "--joint: got ode, expected the method costeff"),
        ("tiny-albert", ["--label", "sentence"], "48 distinct ones"),
        ("tiny-albert", ["--share", "1"], "no shared model can be made of this architecture: got 'albert'"),
        ("tiny-bert", [], "ode does not fit this architecture: got 'bert', expected albert, gpt2"),
        ("tiny-bert", ["--share", "1", "--iterations", "0"], "--iterations"),
        ("tiny-bert", ["--share", "2", "--iterations", "3"], "iterations of shared layers: got 3, expected a multiple"),
    ],
)
def test_refused(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path, name: str, options: list[str], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = cli("train", "ode", tiny(name), "--data", data, "--steps", 10**6, *options)
    assert done.code == 2 and message in done.error
    assert sorted(tmp_path.rglob("*")) == before


def test_places_that_will_not_do(cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    command = ["train", "ode", tiny("tiny-albert"), "--data", data, "--steps", 10**6]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "notes.txt").write_text("years of work")
    assert "thesis: already there" in cli(*command, "-o", "thesis").error
    (tmp_path / "file").write_text("a file")
    assert "file: already there" in cli(*command, "-o", "file").error
    assert "is the model itself" in cli(*command, "-o", tiny("tiny-albert")).error
    # Plugins are for another kind of training.
    assert (
        "--form: got finetune, expected the method ode"
        in cli("train", "finetune", *command[2:], "--form", "block").error
    )
