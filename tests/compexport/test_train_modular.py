"""``compexport train modular`` and ``train finetune`` of models that write, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import writers
from exporter.methods.modular_checkpoint import load_modular

Cli = Callable[..., Any]
ROWS = [("ab", "AH0 B"), ("tok", "T OW1 K"), ("kat", "K AH0 T"), ("bo", "B OW1"), ("o", "OW1"), ("tab", "T AH0 B")]


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = writers.Size(encoder=6, decoder=6, hidden=16, ffn=32, heads=2)
    return writers.make(tmp_path_factory.mktemp("speller") / "t5", writers.t5, writers.spelling_tokenizer, ROWS, size)


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """Data whose columns have names of their own, with a dev split."""
    folder = tmp_path / "spoken"
    folder.mkdir()
    for name, rows in (("train", ROWS * 3), ("dev", ROWS[:4])):
        lines = ["word\tsaid", *("\t".join(row) for row in rows)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_modules_after_teaching_the_base(cli: Cli, speller: Path, spoken: Path, tmp_path: Path) -> None:
    columns = ["--text", "word", "--target", "said"]
    command = ["train", "modular", speller, "--data", spoken, *columns, "--batch-size", 6, "--granularities", "2,6"]
    options = ["--base-epochs", 1, "--steps", 3, "--ratio", "2,6", "--strategy", "size-first", "--init", "last"]
    done = cli(*command, *options, "-o", "out", "--json")
    assert done.code == 0, done.err
    document = done.document
    assert set(document) >= {"method", "output", "ratios", "extra_params", "extra_params_share", "steps", "seconds",
                             "metric", "teacher", "student", "assemblies", "module_params"}  # fmt: skip
    assert document["method"] == "modular" and document["ratios"] == [2, 6] and document["held_out"] == 4
    assert document["finetuned"]["steps"] == 3 and document["steps"] == 3
    assert document["granularities"] == {"encoder": [2, 6], "decoder": [2, 6]}
    assert document["assemblies"]["2"] == {"encoder": [2, 2, 2], "decoder": [2, 2, 2]}
    assert not (tmp_path / "out.unfinished").exists()
    model = load_modular(tmp_path / "out")
    assert model.init_rule == "last" and model.facts.encoder.granularities == (2, 6)
    said = json.loads((tmp_path / "out" / "compexport.json").read_text())["settings"]
    assert said["training"]["finetuned"]["steps"] == 3 and set(said["assemblies"]) == {"2", "6"}
    # What came out knows the task: a second training replaces the modules, and leaves the base alone.
    shown = cli("train", "modular", "out", "--data", spoken, *columns, "--steps", 1, "--ratio", "6", "-o", "out")
    assert shown.code == 0 and "decoder tiles" in shown.out and load_modular(tmp_path / "out").init_rule == "first"
    again = cli("train", "modular", "out", "--data", spoken, *columns, "--base-epochs", 1, "-o", "out")
    assert again.code == 2 and "expected a new folder, as the model is to be fine-tuned first" in again.error


def test_a_model_that_writes_is_finetuned(cli: Cli, speller: Path, spoken: Path, tmp_path: Path) -> None:
    columns = ["--text", "word", "--target", "said"]
    done = cli("train", "finetune", speller, "--data", spoken, *columns, "--steps", 2, "-o", "tuned", "--json")
    assert done.code == 0, done.err
    assert done.document["metric"] == "token_accuracy" and done.document["labels"] == []
    assert (tmp_path / "tuned" / "generation_config.json").exists()
    shown = cli("train", "finetune", "tuned", "--data", spoken, *columns, "--steps", 1, "-o", "more")
    assert shown.code == 0 and "it writes the targets of the data" in shown.out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--granularities", "2.5"], "--granularities: got 2.5, expected whole numbers of layers"),
        (["--granularities", "5"], "too few layers for modules"),
        (["--strategy", "fast"], "strategy: got 'fast', expected size-first or speed-first"),
        (["--ratio", "7"], "ratio: got 7, expected at most 6"),
        (["--base-epochs", "-1"], "base_epochs: got -1.0, expected 0 or more"),
        (["--joint"], "--joint: got modular, expected the method costeff"),
    ],
)
def test_wrong_options_are_refused(cli: Cli, speller: Path, spoken: Path, options: list[str], message: str) -> None:
    columns = ["--text", "word", "--target", "said"]
    done = cli("train", "modular", speller, "--data", spoken, *columns, "--steps", 1, *options)
    assert done.code == 2 and message in done.error
