"""``compexport train costeff`` from the command line: a whole run, killed and resumed, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calib.costeff.fit import CosteffResult
from compexport import api, training
from compexport.errors import InputError
from exporter.backbone import load_backbone
from exporter.checkpoint import find_checkpoint
from exporter.methods.costeff import CosteffModel, SlenderShape
from tests.compexport.runs import Whole, in_a_process, killed_once_saved, same

Cli = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_whole_path_from_a_pre_trained_model(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    command = ["train", "costeff", tiny(), "--data", data, "--batch-size", 8, "--precision", "fp32"]
    done = cli(*command, "--ratio", "1,2,2.5", "--steps", 30, "-o", "out", "--json")
    assert done.code == 0, done.err
    document = done.document
    assert set(document) >= {"method", "output", "ratios", "extra_params", "extra_params_share", "steps", "seconds",
                             "metric", "teacher", "student", "exits", "exits_mean", "shapes", "stages"}  # fmt: skip
    assert document["ratios"] == [1, 2, 2.5] and document["method"] == "costeff" and document["held_out"] == 12
    assert set(document["exits"]) == {"1", "2", "2.5"} and document["labels"] == ["bad", "good", "neither"]
    assert not (tmp_path / "out.unfinished").exists()
    found = find_checkpoint(tmp_path / "out", "costeff")
    assert found is not None and found.ratios == [1, 2, 2.5]
    # What came out is fine-tuned: into its own folder goes a preset, from its own weights.
    named = cli("train", "costeff", "out", "--data", data, "--preset", "a2,a1_l2_f8_e4", "--steps", 5, "-o", "out")
    assert named.code == 0 and "it is not fine-tuned again" in named.err
    found = find_checkpoint(tmp_path / "out")
    assert found is not None and len(found.ratios) == 5
    smallest = found.ratios[-1]
    model = CosteffModel.from_tensors(found.load(smallest), load_backbone(tmp_path / "out"), "test")
    assert model.shape == SlenderShape.uniform(2, 1, 8, 4) and smallest == round(model.ratio, 2)
    assert "a1_l2_f8_e4" in named.out and "after each layer" in named.out


def test_nothing_but_exits_for_the_backbone_itself(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    done = cli("train", "costeff", tiny(), "--data", data, "--ratio", 1, "--steps", 6, "-o", "out", "--json")
    assert done.code == 0 and list(done.document["stages"]) == ["1-finetune", "r1-exits"]
    assert done.document["extra_params_share"]["1"] < 0.1 and done.document["assistant"] is None
    jointly = [
        "train",
        "costeff",
        "out",
        "--data",
        data,
        "--ratio",
        1,
        "--joint",
        "--steps",
        3,
        "-o",
        "joint",
        "--json",
    ]
    done = cli(*jointly)
    assert done.code == 0 and list(done.document["stages"]) == ["2-assist"]
    assert done.document["extra_params_share"]["1"] > 0.9


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path], kept_data: Path) -> Whole:
    """A run that nobody kills."""
    steps = ["--steps", 100, "--batch-size", 8, "--save-every", 4, "--precision", "fp32"]
    command = ["train", "costeff", tiny(), "--data", kept_data, "--ratio", "2", *steps]
    return Whole.run(command, tmp_path_factory.mktemp("whole") / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1-finetune", "r2-3-event-1", "r2-5-prediction"])
def test_a_killed_run_goes_on(cli: Cli, whole: Whole, tmp_path: Path, stage: str) -> None:
    command = whole.command
    killed_once_saved(tmp_path, "killed", *command, stage=stage)
    refused = cli(*command, "-o", "killed")
    assert refused.code == 2 and "killed.unfinished: holds an unfinished run" in refused.error
    other = cli(*command, "-o", "killed", "--resume", "--heads-per-event", 1)
    assert other.code == 2 and "had other settings: got heads_per_event 1, expected heads_per_event 2" in other.error
    done = cli(*command, "-o", "killed", "--resume", "--json")
    assert done.code == 0 and done.document["exits"] == whole.document["exits"]
    for file in ("model.safetensors", "costeff-r2.safetensors"):
        assert same(tmp_path / "killed" / file, whole.output / file)
    assert not (tmp_path / "killed.unfinished").exists()


def test_a_run_killed_before_it_was_tidied_up(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = CosteffResult.save

    def killed(self: CosteffResult, folder: Path) -> None:
        saved(self, folder)
        raise KeyboardInterrupt

    out, fit = tmp_path / "out", api.Fit(steps=4, batch_size=8, max_length=16, precision="fp32")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CosteffResult, "save", killed)
        training.train(tiny(), data, ratios=[1], output=out, method="costeff", fit=fit)
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    command = ["train", "costeff", tiny(), "--data", data, "--ratio", 1, "--batch-size", 8, "--max-length", 16]
    command += ["--precision", "fp32", "-o", "out", "--resume"]
    assert "had other settings" in cli(*command, "--steps", 5).error
    done = cli(*command, "--steps", 4)
    assert done.code == 0 and not (tmp_path / "out.unfinished").exists()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written


@pytest.mark.slow
def test_two_processes_train_together(cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    command = ["train", "costeff", tiny(), "--data", data, "--ratio", "1,2", "--steps", 40, "--batch-size", 8]
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "compexport"]
    process = in_a_process(tmp_path, *launched, *command, "--precision", "fp32", "-o", "two", "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    document = json.loads(out)  # of one process: two would not be one document
    assert err.count("loading the model") == 1 and "Warning" not in err
    alone = cli(*command, "-o", "one", "--json").document
    assert {name: one["steps"] for name, one in document["stages"].items()} == {
        name: one["steps"] for name, one in alone["stages"].items()
    }
    found = find_checkpoint(tmp_path / "two")
    assert found is not None and found.settings["shapes"] == alone["shapes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "0.5"], "--ratio is too small: got 0.5, expected 1 or more"),
        (["--ratio", "2,2"], "--ratio is there twice: got 2"),
        (["--ratio", "500"], "ratio: got 500, expected at most"),
        (["--preset", "a7"], "unknown preset: got 'a7', expected one of a6, a4, a2"),
        (["--preset", "a2_l12_f256_e128"], "preset a2_l12_f256_e128: layers: got 12, expected 2"),
        (["--ratio", "4", "--preset", "a1_l2_f16_e8"], "preset a1_l2_f16_e8 has a ratio that is there already: got 4"),
        (["--preset", "a4_l2_f64_e4"], "preset a4_l2_f64_e4: ratio 1, which is the full width: got a4_l2_f64_e4"),
        (["--ratio", "2,4", "--joint"], "--joint: got no ratio 1, expected --ratio 1, or 1,2,4"),
        (["--loss", "task"], "--loss: got costeff, expected the method variator"),
        (["--start", "x"], "--start: got costeff, expected the method variator"),
        (["--epochs", "2", "--steps", "3"], "both --steps and --epochs were given"),
        (["--learning-rate", "0"], "learning_rate: got 0.0, expected more than 0"),
        (["--precision", "fp8"], "unknown precision: got fp8"),
        (["--label", "sentence"], "48 distinct ones"),
    ],
)
def test_refused(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = cli("train", "costeff", tiny(), "--data", data, *options)
    assert done.code == 2 and message in done.error
    assert sorted(tmp_path.rglob("*")) == before


def test_zero_is_a_value(tiny: Callable[..., Path], data: Path) -> None:
    for name in ("heads_per_event", "importance_rows"):
        with pytest.raises(InputError, match=f"{name}: got 0, expected more than 0"):
            training.train(tiny(), data, method="costeff", slender=api.Slender(**{name: 0}))


def test_pooling_has_two_names(cli: Cli, tiny: Callable[..., Path], data: Path) -> None:
    done = cli("train", "costeff", tiny(), "--data", data, "--ratio", "2", "--pooling", "max")
    assert done.code == 2 and "pooling: got max, expected one of cls, cls+mean" in done.error


def test_models_and_places_that_will_not_do(cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    command = ["--data", data, "--ratio", "2", "--steps", 10**6]
    assert (
        "COST-EFF does not fit this architecture: got 't5'" in cli("train", "costeff", tiny("tiny-t5"), *command).error
    )
    (tmp_path / "texts.txt").write_text("no\nlabels\nhere\n")
    unlabelled = cli("train", "costeff", tiny(), *command, "--data", "texts.txt")
    assert "texts.txt: no label column recognised: expected labels" in unlabelled.error
    plugins = ["train", "variator", tiny(), "--data", data, "--ratio", "2", "--steps", 1, "-o", "plugins"]
    assert cli(*plugins).code == 0
    other = cli("train", "costeff", tiny(), *command, "-o", "plugins")
    assert "plugins: a checkpoint of another method: got variator, expected costeff" in other.error
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "notes.txt").write_text("years of work")
    assert "thesis: already there" in cli("train", "costeff", tiny(), *command, "-o", "thesis").error
    assert not list(tmp_path.glob("*.unfinished"))


def test_one_table_of_the_file_serves_all_methods(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    slender = 'ratio = [1, 2]\nheads-per-event = 4\nimportance-rows = 8\nloss = "task-hidden"\nfresh = true\n'
    (tmp_path / "compexport.toml").write_text(f'[train]\ndata = "data"\nsteps = 5\n{slender}')
    done = cli("train", "costeff", tiny(), "-o", "out", "--json")
    assert done.code == 0 and done.document["ratios"] == [1, 2]
    assert [name for name in done.document["stages"] if "event" in name] == ["r2-3-event-1"]
    assert cli("train", "finetune", tiny(), "-o", "tuned").code == 0
