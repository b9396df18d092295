"""``compexport build`` of COST-EFF families: exits as asked, by default, and chosen on texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compexport.api import Fit
from compexport.errors import InputError
from compexport.training import variator
from engines.bundle import Bundle
from exporter import family
from exporter.backbone import load_backbone
from exporter.checkpoint import save_checkpoint
from exporter.methods.costeff import CosteffModel
from exporter.methods.costeff_checkpoint import stored_tensors
from exporter.methods.slender import shape_for_ratio
from tests import models

CLASSIFIER = "sequence-classification"
Cli = Callable[..., Any]


@pytest.fixture(scope="session")
def deep(tiny: Callable[..., Path]) -> Path:
    return tiny("tiny-bert-deep", CLASSIFIER)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, deep: Path) -> Path:
    """A checkpoint of ratio 2 whose exits are sure from the second layer on, and whose first is wrong."""
    backbone = load_backbone(deep)
    model = CosteffModel.from_backbone(backbone, shape_for_ratio(backbone, 2))
    tensors = stored_tensors(model, backbone)
    for layer, lead in enumerate((-0.1, 3.0, 3.0)):
        name = f"bert.encoder.highway.{layer}.classifier"
        tensors[f"{name}.weight"] = torch.zeros(2, models.HIDDEN)
        tensors[f"{name}.bias"] = torch.tensor([lead, 0.0])
    tensors["classifier.weight"] = torch.zeros(2, models.HIDDEN)
    tensors["classifier.bias"] = torch.tensor([3.0, 0.0])
    tensors |= {name: t for name, t in model.state_dict().items() if name.startswith("bert.pooler.")}
    folder = tmp_path_factory.mktemp("trained") / "model"
    settings = {"shapes": {"2": model.shape.document()}}
    save_checkpoint(folder, deep, "costeff", settings, {2: tensors})
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(models.TEXTS) + "\n")
    return path


def test_untrained(cli: Cli, deep: Path, tmp_path: Path) -> None:
    command = ["build", deep, "--method", "costeff", "--ratio", "2.5", "--untrained", "--exits", "2,3", "--prefix"]
    document = cli(*command, "--json").document
    assert [row["variant"] for row in document["variants"]] == ["costeff-r1-fp32", "costeff-r2.5-fp32"]
    assert [row["untrained"] for row in document["variants"]] == [False, True]
    variant = Bundle.open(tmp_path / "bundle").manifest.variants["costeff-r2.5-fp32"]
    assert variant.exits == [2, 3, 4]
    assert {role for role in variant.graphs if role.startswith("prefix-")} == {"prefix-2", "prefix-3", "prefix-4"}
    assert all(row["reused"] for row in cli(*command, "--json").document["variants"])
    assert "costeff-r2.5-s2" in cli("inspect").out


def test_exits_are_chosen_on_texts(cli: Cli, trained: Path, texts: Path, tmp_path: Path) -> None:
    done = cli("build", trained, "--exits", "auto", "--data", texts)
    assert done.code == 0, done.err
    variants = Bundle.open(tmp_path / "bundle").manifest.variants
    assert variants["costeff-r2-fp32"].exits == [2, 4] and variants["costeff-r1-fp32"].exits is None
    assert "ratio 2: exits after layers 2, 4" in done.err
    again = cli("build", trained, "--data", texts, "--json").document
    assert all(row["reused"] for row in again["variants"]), "with data, auto is the default"
    plain = cli("build", trained, "--json").document
    assert [row["reused"] for row in plain["variants"]] == [True, False], "without, it is about every quarter"
    assert Bundle.open(tmp_path / "bundle").manifest.variants["costeff-r2-fp32"].exits == [1, 2, 3, 4]


def test_exits_in_the_file(cli: Cli, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "compexport.toml").write_text("[build]\nratio = 2\nexits = [3]\n")
    assert cli("build", trained).code == 0
    assert Bundle.open(tmp_path / "bundle").manifest.variants["costeff-r2-fp32"].exits == [3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exits", "2,9"], "--exits beyond the depth: got 9, expected 1 to 4; the model has 4 layers"),
        (["--exits", "3,2"], "--exits must rise: got 3,2"),
        (["--exits", "0,2"], "--exits are layers counted from 1: got 0"),
        (["--exits", "1.5"], "--exits are whole layers: got 1.5"),
        (["--exits", "all"], "--exits is not a number: got 'all'"),
        (["--exits", "auto"], "--exits auto chooses on texts: expected --data FILE, and a trained model"),
        (["--ratio", "0.5"], "--ratio is too small: got 0.5"),
        (["--ratio", "nan"], "--ratio is too small: got nan"),
        (["--ratio", "2,2.0"], "--ratio is there twice: got 2"),
        (["--ratio", "3"], "no trained slender model for ratio 3: got ratios [2]"),
        (["--method", "variator"], "a checkpoint of another method: got costeff, expected variator"),
        (["--method", "later"], "unknown method: got later, expected variator or costeff or modular or ode"),
    ],
)
def test_bad_input(cli: Cli, trained: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = cli("build", trained, *options)
    assert done.code == 2 and message in done.error
    assert not (tmp_path / "bundle").exists()


def test_exits_of_other_methods_and_untrained_models(cli: Cli, deep: Path, trained: Path, texts: Path) -> None:
    assert "--exits: got the method variator, expected costeff" in cli("build", deep, "--exits", "2").error
    assert "--prefix: got the method variator, expected costeff" in cli("build", deep, "--prefix").error
    asked = cli("build", trained, "--ratio", "2,8", "--data", texts)
    assert (
        "no trained slender model for ratio 8: got ratios [2]; fit them with `compexport train costeff" in asked.error
    )
    assert (
        "--exits auto chooses on texts"
        in cli("build", deep, "--method", "costeff", "--untrained", "--exits", "auto").error
    )


def test_exits_in_the_file_are_for_families_that_have_some(cli: Cli, deep: Path, tmp_path: Path) -> None:
    (tmp_path / "compexport.toml").write_text("[build]\nratio = 2\nexits = [3]\nprefix = true\n")
    assert "no trained plugins for ratio 2" in cli("build", deep).error
    assert "--exits: got the method variator, expected costeff" in cli("build", deep, "--exits", "2").error


def test_a_method_of_a_later_version(cli: Cli, trained: Path, tmp_path: Path) -> None:
    later = Path(shutil.copytree(trained, tmp_path / "later"))
    document = json.loads((later / "compexport.json").read_text())
    (later / "compexport.json").write_text(json.dumps({**document, "method": "pruned"}))
    expected = "later: unknown method: got pruned, expected variator or costeff or modular or ode; upgrade compexport"
    assert cli("build", "later").error == expected
    with pytest.raises(InputError, match="unknown method: got pruned"):
        family.build(later, [2], tmp_path / "bundle")


def test_plugins_do_not_start_from_slender_models(trained: Path) -> None:
    backbone = load_backbone(trained)
    assert variator._starting_plugins(backbone, [2], Fit()) == ({}, "masked")
    with pytest.raises(InputError, match="another method: got costeff, expected variator"):
        variator._starting_plugins(backbone, [2], Fit(start=trained))
