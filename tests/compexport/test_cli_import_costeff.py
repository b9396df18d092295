"""``compexport import costeff``, and the whole way from an official folder to answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from tokenizers import Tokenizer

from tests.compexport.conftest import TEXTS, labelled_texts
from tests.exporter.importers import costeff_official as official
from tests.exporter.importers.costeff_official import Official, Sizes

Cli = Callable[..., Any]

SIZES = Sizes(positions=96)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return official.write(tmp_path / "a2_l4_f20_e7", SIZES, official.random_tensors(SIZES))


def test_document(cli: Cli, folder: Path, tmp_path: Path) -> None:
    done = cli("import", "costeff", folder, "--json")
    document = done.document
    params = sum(tensor.numel() for tensor in official.random_tensors(SIZES).values())
    share = document.pop("params_share")
    assert document == {
        "method": "costeff",
        "output": "imported",
        "ratio": 1.88,
        "ratios": [1.88],
        "shape": {"heads": [2] * 4, "neurons": [20] * 4, "embedding": 7},
        "params": params,
        "tensors": len(official.random_tensors(SIZES)),
        "backbone": str(folder),
        "backbone_from_file": True,
    }
    assert 0 < share < 1
    assert (tmp_path / "imported" / "costeff-r1.88.safetensors").is_file()
    # A folder whose backbone is known adds to itself.
    again = cli("import", "costeff", folder, "--backbone", "imported", "-o", "imported", "--json").document
    assert (again["backbone"], again["backbone_from_file"]) == ("imported", False)


def test_people_get_a_table(cli: Cli, folder: Path) -> None:
    count = len(official.random_tensors(SIZES))
    done = cli("import", "costeff", folder, "-o", "out")
    assert done.code == 0 and f"out: {count} tensors imported" in done.out
    assert "the backbone is this model at full width" in done.out and "ratios there now: 1.88" in done.out
    done = cli("import", "costeff", folder, "--backbone", "out", "-o", "out")
    assert "backbone from out; ratios there now: 1.88" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "costeff", "nowhere"], "nowhere: no COST-EFF checkpoint: got no such folder"),
        (["import", "costeff", "."], ".: no COST-EFF checkpoint: got no config.json in it"),
        (["import", "costeff", "official/pytorch_model.bin"], "no COST-EFF checkpoint: got a file"),
        (
            ["import", "variator", "x.pkl", "--backbone", "official"],
            "official: a COST-EFF checkpoint, whatever model_ty",
        ),
        (["build", "official"], "official: a COST-EFF checkpoint, whatever model_type its config.json says"),
        (
            ["build", "official", "--method", "costeff"],
            "official: a COST-EFF checkpoint, whatever model_type its config",
        ),
        (
            ["train", "variator", "official", "--data", "dev.tsv"],
            "official: a COST-EFF checkpoint, whatever model_type",
        ),
        (
            ["train", "finetune", "official", "--data", "dev.tsv"],
            "official: a COST-EFF checkpoint, whatever model_type",
        ),
    ],
)
def test_refused(cli: Cli, folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    folder.rename(tmp_path / "official")
    labelled_texts(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = cli(*arguments)
    assert done.code == 2 and not done.out
    assert message in done.error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_from_an_official_folder_to_answers(cli: Cli, folder: Path) -> None:
    """The engines answer as the official network does, whether a text goes all the way or the backbone answers."""
    assert cli("import", "costeff", folder, "-o", "out").code == 0
    built = cli("build", "out", "--json")
    assert built.code == 0, built.err
    assert [row["ratio"] for row in built.document["variants"]] == [1, 1.88]
    assert all(row["parity_max_abs"] <= 1e-4 for row in built.document["variants"])
    encode = Tokenizer.from_file("bundle/tokenizer.json")
    encode.enable_padding(pad_id=0, pad_token="[PAD]")
    rows = encode.encode_batch(TEXTS)
    inputs = [torch.tensor([getattr(row, key) for row in rows]) for key in ("ids", "attention_mask", "type_ids")]
    logits = Official(official.random_tensors(SIZES), SIZES).run(*inputs)[1][-1]
    expected = torch.softmax(torch.from_numpy(logits), dim=-1)
    assert expected.amax(0).max() - expected.amin(0).min() > 0.1  # they do depend on the text
    arguments = [argument for text in TEXTS for argument in ("--text", text)]
    for ratio in ("1", "1.88"):
        done = cli("run", *arguments, "--ratio", ratio, "--json")
        assert done.code == 0, done.err
        scores = [[output["scores"][f"LABEL_{i}"] for i in range(2)] for output in done.document["outputs"]]
        assert_allclose(scores, expected, atol=1e-4)
