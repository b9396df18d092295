"""``compexport train`` from the command line: both methods, killed and resumed, in several processes, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.checkpoint import find_checkpoint
from tests.compexport.conftest import LABELS
from tests.compexport.runs import in_a_process, killed_once_saved, same, tensors

Cli = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("one_thread")


RUNS = {
    "together": ("variator", "--ratio", "2,8", ["variator-r2.safetensors", "variator-r8.safetensors"]),
    "separately": ("variator", "--ratio=2,4", "--separately", ["variator-r2.safetensors", "variator-r4.safetensors"]),
    "finetune": ("finetune", "--max-length", "16", ["model.safetensors"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_killed_run_goes_on(cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path, kind: str) -> None:
    method, *options, files = RUNS[kind]
    steps = ["--steps", 150, "--batch-size", 8, "--save-every", 10, "--precision", "fp32"]
    command = ["train", method, tiny(), "--data", data, *options, *steps]
    killed_once_saved(tmp_path, "killed", *command)

    refused = cli(*command, "-o", "killed")
    assert refused.code == 2
    assert "killed.unfinished: holds an unfinished run: got step" in refused.error
    assert "add --resume to continue it, or delete that folder" in refused.error
    other = cli(*command, "-o", "killed", "--resume", "--learning-rate", 0.5)
    assert other.code == 2
    assert "the unfinished run had other settings: got learning_rate 0.5, expected learning_rate" in other.error

    done = cli(*command, "-o", "killed", "--resume", "--json")
    assert done.code == 0 and done.document["steps"] == 150
    assert not (tmp_path / "killed.unfinished").exists()
    assert cli(*command, "-o", "whole").code == 0
    for file in files:
        assert same(tmp_path / "killed" / str(file), tmp_path / "whole" / str(file))


def test_what_was_only_not_written_is_not_trained_again(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calib.fit import FitResult

    command = ["train", "variator", tiny(), "--data", data, "--ratio", "2", "--steps", 3, "-o", "out"]
    with monkeypatch.context() as broken:
        broken.setattr(FitResult, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert cli(*command).error == "No space left on device"
    kept = [path.name for path in (tmp_path / "out.unfinished").iterdir()]
    assert sorted(kept) == ["checkpoint-3", "run.json"]
    done = cli(*command, "--resume", "--json")
    assert done.document["steps"] == 3 and "fit " not in done.err
    assert (tmp_path / "out" / "variator-r2.safetensors").exists() and not (tmp_path / "out.unfinished").exists()


def test_nothing_is_left_of_a_run_that_never_began(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    classifier = tiny("tiny-bert", "sequence-classification")
    # Its labels are negative and positive: said before the fit, although the loss needs none.
    done = cli("train", "variator", classifier, "--data", data, "--ratio", "2", "--steps", 10**6)
    assert done.code == 2 and "unknown label: got 'good', expected one of negative, positive" in done.error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_two_processes_fit_as_one(cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    # Cross-entropy is a mean over rows, so the mean of two halves is that of the whole, up to rounding.
    tuned = tmp_path / "tuned"
    assert cli("train", "finetune", tiny(), "--data", data, "--steps", 2, "-o", tuned).code == 0
    command = ["train", "variator", tuned, "--data", data, "--ratio", "2,8", "--loss", "task", "--precision", "fp32"]
    command += ["--steps", 4, "--batch-size", 8, "--json"]
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "compexport"]
    process = in_a_process(tmp_path, *launched, *command, "-o", "two")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    document = json.loads(out)  # of one process: two would not be one document
    assert err.count("loading the model") == 1 and "Warning" not in err
    alone = cli(*command, "-o", "one").document
    assert document["steps"] == alone["steps"] == 4 and not (tmp_path / "two.unfinished").exists()
    for ratio in (2, 8):
        file = f"variator-r{ratio}.safetensors"
        ours, theirs = tensors(tmp_path / "two" / file), tensors(tmp_path / "one" / file)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


def test_only_the_first_process_speaks(
    cli: Cli, tiny: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "variator", tiny(), "--data", data, "--ratio", "2", "--steps", 1]
    for rank, speaks in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        done, refused = cli(*command, "--json"), cli(*command, "--batch-size", 0)
        assert (done.code, bool(done.out), bool(done.err)) == (0, speaks, speaks)
        assert (refused.code, bool(refused.err)) == (2, speaks)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("compexport.training.train", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no memory")))
    assert "no memory" in cli(*command).error  # what fails in one process only is not hushed up


def test_a_batch_has_a_row_for_every_process(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calib.processes.count", lambda: 4)
    monkeypatch.setattr("calib.processes.by_first", lambda do: do())
    done = cli("train", "variator", tiny(), "--data", data, "--batch-size", 3)
    assert done.code == 2 and "batch size: got 3, expected at least 4, one text for each process" in done.error
    assert not list(tmp_path.glob("trained*"))


def test_the_whole_path_from_a_pre_trained_model(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    tuned = cli("train", "finetune", tiny(), "--data", data, "--epochs", 2, "--batch-size", 8, "-o", "tuned", "--json")
    assert set(tuned.document) >= {"method", "labels", "steps", "seconds", "metric", "value", "majority", "output"}
    assert tuned.document["labels"] == sorted(LABELS) and tuned.document["steps"] == 12
    assert tuned.document["metric"] == "accuracy" and 0 <= tuned.document["value"] <= 1
    assert tuned.document["majority"] == pytest.approx(1 / 3)
    # Pre-training of plugins without labels, on the model that was not yet fine-tuned, then adaptation.
    pre = cli("train", "variator", tiny(), "--data", data, "--ratio", "2,4", "--steps", 2, "-o", "pre", "--json")
    assert pre.document["metric"] == "cosine" and pre.document["continued"] == []
    command = ["train", "variator", "tuned", "--data", data, "--steps", 2, "--ratio", "2,4", "--loss", "task-hidden"]
    adapted = cli(*command, "--start", "pre", "-o", "fitted", "--json").document
    assert adapted["metric"] == "accuracy" and adapted["continued"] == [2, 4]
    again = cli("train", "variator", "fitted", "--data", data, "--steps", 1, "--ratio", "2", "-o", "fitted", "--json")
    assert again.document["continued"] == [2]
    fresh = cli(*command, "--fresh", "--separately", "-o", "fitted", "--json").document
    assert fresh["continued"] == [] and fresh["separately"] and fresh["ratios"] == [2, 4]
    found = find_checkpoint(tmp_path / "fitted")
    assert found is not None and found.ratios == [2, 4]


def test_spans_from_the_command_line(cli: Cli, tiny: Callable[..., Path], data: Path) -> None:
    cli("train", "finetune", tiny(), "--data", data, "--steps", 1, "-o", "tuned")
    command = ["train", "variator", "tuned", "--data", data, "--steps", 1, "--ratio", "2,4", "-o", "spans"]
    assert cli(*command, "--span", 2, "--loss", "task-hidden", "--json").document["ratios"] == [2, 4]
    again = cli("train", "variator", "spans", *command[3:], "--span", 2, "--json").document
    assert again["continued"] == [2, 4]
    for options, got, expected in (
        ([], "--span 2", "plugins around every feed-forward network"),
        (["--span", 1], "--span 2", "--span 1"),
    ):
        refused = cli("train", "variator", "spans", *command[3:], *options)
        assert refused.code == 2 and f"other plugins: got {got}, expected {expected}" in refused.error
    assert cli("train", "variator", "spans", *command[3:], "--span", 1, "--fresh", "--json").code == 0
    # A ratio that the folder lacks is fitted in the form that it has.
    assert cli("build", "spans", "--ratio", "2,4,8", "--data", data, "--steps", 1, "--json").code == 0
    variants = cli("inspect", "--json").document["variants"]
    assert [variants[f"variator-r{ratio}-fp32"]["settings"]["span"] for ratio in (2, 4, 8)] == [1, 1, 1]
    evaluated = cli("evaluate", "bundle", "--data", data, "--json").document
    assert [row["variant"] for row in evaluated["variants"]] == [f"variator-r{ratio}-fp32" for ratio in (1, 2, 4, 8)]


def test_fine_tuning_leaves_test_data_alone(cli: Cli, tiny: Callable[..., Path], data: Path) -> None:
    (data / "dev.tsv").unlink()
    (data / "test.tsv").write_text("index\tsentence\n0\ta fine film\n")
    done = cli("train", "finetune", tiny(), "--data", data, "--steps", 1, "--json")
    assert done.code == 0 and done.document["value"] is None and done.document["held_out"] == 0


def test_a_few_rows_by_seed_or_the_first(cli: Cli, tiny: Callable[..., Path], data: Path) -> None:
    command = ("train", "variator", tiny(), "--data", data, "--ratio", "2", "--steps", 1)
    done = cli(*command, "--limit", 20, "--seed", 3, "-o", "a", "--json")
    assert done.document["texts"] + done.document["held_out"] == 20 and "drawn by seed 3" in done.err
    first = cli(*command, "--limit", 20, "--first", "-o", "b", "--json")
    assert "20 texts of" in first.err and "drawn" not in first.err


def test_a_place_that_will_not_do_is_refused_before_the_fit(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    command = ("train", "variator", tiny(), "--data", data, "--steps", 1)
    assert cli(*command, "--ratio", "2,4", "-o", "out").code == 0
    other = cli("train", "variator", tiny("tiny-roberta"), "--data", data, "--steps", 10**6, "-o", "out")
    assert "out: already there: expected a new folder, or a checkpoint of this model" in other.error
    description = tmp_path / "out" / "compexport.json"
    description.write_text(description.read_text().replace('"pad": "masked"', '"pad": "official"'))
    mixed = cli(*command, "--steps", 10**6, "--ratio", "2", "-o", "out")
    assert "out: ratios [4] have pad official: got pad masked; use another folder" in mixed.error
    again = cli(*command, "--resume", "--ratio", "2", "-o", "new")
    assert again.code == 0 and "no unfinished run: starting from the beginning" in again.err


def test_epochs_are_passes_over_the_rows(cli: Cli, tiny: Callable[..., Path], data: Path) -> None:
    command = ("train", "variator", tiny(), "--data", data, "--ratio", "2", "--limit", 18, "--batch-size", 8)
    done = cli(*command, "--epochs", 2, "--json").document
    assert (done["texts"], done["held_out"], done["steps"]) == (16, 2, 2 * 2)


def test_one_table_of_the_file_serves_both_methods(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    plugins = 'ratio = [2]\nloss = "task-hidden"\nseparately = true\nfresh = true\nstart = "tuned"\n'
    (tmp_path / "compexport.toml").write_text(f'[train]\ndata = "data"\nsteps = 1\n{plugins}')
    assert cli("train", "finetune", tiny(), "-o", "tuned").code == 0
    assert "expected the method variator" in cli("train", "finetune", tiny(), "-o", "x", "--ratio", "2").error
    assert "both --fresh and --start" in cli("train", "variator", "tuned").error


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "finetune",
            ["--ratio", "2"],
            "--ratio: got finetune, expected the method variator or costeff or ode or modular",
        ),
        ("finetune", ["--loss", "task"], "--loss: got finetune, expected the method variator"),
        ("finetune", ["--separately"], "--separately: got finetune, expected the method variator"),
        ("finetune", ["--joint"], "--joint: got finetune, expected the method costeff"),
        ("variator", ["--heads-per-event", "2"], "--heads-per-event: got variator, expected the method costeff"),
        ("finetune", ["--epochs", "2", "--steps", "3"], "both --steps and --epochs were given"),
        ("finetune", ["--epochs", "0"], "--epochs: got 0.0, expected more than 0"),
        ("finetune", ["--label", "sentence"], "48 distinct ones (good a fine film"),
        ("finetune", ["--label", "gold"], "no column for --label: got gold, expected sentence, label"),
        ("finetune", ["--precision", "fp8"], "unknown precision: got fp8, expected auto or fp32 or bf16"),
        ("finetune", ["--learning-rate", "-1"], "learning_rate: got -1.0, expected more than 0, at most 1"),
        ("finetune", ["--learning-rate", "1e38"], "learning_rate: got 1e+38, expected more than 0, at most 1"),
        ("variator", ["--learning-rate", "1e38"], "learning_rate: got 1e+38, expected more than 0, at most 1"),
        ("variator", ["--learning-rate", "nan"], "learning_rate: got nan, expected more than 0, at most 1"),
        ("finetune", ["--max-length", "1"], "max_length: got 1, expected at least 4 tokens"),
        ("variator", ["--loss", "labels"], "unknown loss: got labels, expected hidden or task or task-hidden"),
        ("variator", ["--precision", "fp8"], "unknown precision: got fp8"),
        ("variator", ["--loss", "task"], "loss task: got feature-extraction, expected sequence-classification"),
        ("variator", ["--span", "2"], "--span: got a model for feature-extraction, expected one for sequence-class"),
        ("variator", ["--span", "0"], "--span"),
        ("finetune", ["--span", "2"], "--span: got finetune, expected the method variator"),
        ("variator", ["--start", "data"], "data: no plugins, expected a folder made by `compexport train`"),
        ("variator", ["--start", "x", "--fresh"], "both --fresh and --start were given"),
    ],
)
def test_refused(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path, method: str, options: list[str], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = cli("train", method, tiny(), "--data", data, *options)
    assert done.code == 2 and message in done.error.replace(": expected", ", expected")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_defaults_work_in_the_folder_of_the_model(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny(), tmp_path / "model"))
    (model / "2_Normalize").mkdir()  # empty in sentence-transformers' folders too, where it is kept at all
    own = {path.relative_to(model) for path in model.rglob("*")}
    assert Path("1_Pooling/config.json") in own
    for other in ("bundle", "older.unfinished", "thesis"):
        (model / other).mkdir()
        (model / other / "notes.txt").write_text("years of work")
    (model / ".bundle.lock").touch()
    monkeypatch.chdir(model)
    command = ("train", "variator", "--data", data, "--ratio", "2", "--save-every", 1)
    for steps in (1, 2):  # the second into the folder that the first made
        assert cli(*command, "--steps", steps).code == 0
        written = {path.relative_to(model / "trained") for path in (model / "trained").rglob("*")}
        assert written == own | {Path("compexport.json"), Path("variator-r2.safetensors")}


def test_a_fine_tuned_model_replaces_nothing_but_an_older_one(
    cli: Cli, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    command = ["train", "finetune", tiny(), "--data", data, "--steps", 1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "mine: already there" in cli(*command, "-o", "mine").error
    assert "is the model itself" in cli(*command, "-o", tiny()).error
    assert cli(*command, "-o", "new").code == 0
    first = (tmp_path / "new" / "model.safetensors").read_bytes()
    assert cli(*command, "-o", "new", "--seed", 5).code == 0
    assert (tmp_path / "new" / "model.safetensors").read_bytes() != first
    (tmp_path / "new" / "compexport.json").write_text("{}")
    assert "plugins were fitted to the model that is there" in cli(*command, "-o", "new").error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mine", "new"]
