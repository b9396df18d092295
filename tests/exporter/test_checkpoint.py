"""Method checkpoints: a model folder that also holds plugins."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from compexport.errors import InputError
from exporter.backbone import Backbone
from exporter.checkpoint import DESCRIPTION, find_checkpoint, save_checkpoint
from exporter.identity import backbone_sha256
from tests import models
from tests.exporter.conftest import random_plugins

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def plugins(backbone: Callable[..., Backbone]) -> Callable[[int], Tensors]:
    return lambda ratio: dict(random_plugins(backbone(), ratio).state_dict())


@pytest.fixture
def bert(tiny: Callable[..., Path]) -> Path:
    return tiny("tiny-bert")


@pytest.fixture
def saved(tmp_path: Path, bert: Path, plugins: Callable[[int], Tensors]) -> Path:
    """A checkpoint of ratios 2 and 4."""
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, bert, "variator", {"pad": "masked"}, {2: plugins(2), 4: plugins(4)})
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit(folder: Path, **changes: Any) -> None:
    path = folder / DESCRIPTION
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        find_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_round_trip(saved: Path, bert: Path, plugins: Callable[[int], Tensors]) -> None:
    found = find_checkpoint(saved)
    assert found is not None
    assert (found.method, found.ratios, found.pad) == ("variator", [2, 4], "masked")
    assert found.backbone_sha256 == backbone_sha256(bert) == backbone_sha256(saved)
    assert all(same(found.load(ratio), plugins(ratio)) for ratio in (2, 4))
    assert found.sha256(2) != found.sha256(4)
    # The backbone's own files are all there, byte for byte, and nothing but the checkpoint's was added.
    added = {DESCRIPTION, "variator-r2.safetensors", "variator-r4.safetensors"}
    assert {name: sha for name, sha in contents(saved).items() if name not in added} == contents(bert)
    assert contents(saved).keys() >= added


def test_a_bare_model_holds_no_checkpoint(bert: Path) -> None:
    assert find_checkpoint(bert) is None


def test_adding_and_replacing_ratios(saved: Path, bert: Path, plugins: Callable[[int], Tensors]) -> None:
    newer = {name: tensor + 1 for name, tensor in plugins(4).items()}
    before = contents(saved)["variator-r2.safetensors"]
    found = save_checkpoint(saved, bert, "variator", {"steps": 7}, {4: newer, 8: plugins(8)})
    assert found.ratios == [2, 4, 8]
    assert found.settings == {"pad": "masked", "steps": 7}
    assert contents(saved)["variator-r2.safetensors"] == before
    assert same(found.load(4), newer)


def test_what_is_said_of_a_ratio_goes_when_it_is_replaced(
    tmp_path: Path, bert: Path, plugins: Callable[[int], Tensors]
) -> None:
    folder = tmp_path / "out"
    first = {"shapes": {"2": "a", "4": "b"}, "imported": {"2": "x"}, "training": {"4": "y"}}
    save_checkpoint(folder, bert, "variator", first, {2: plugins(2), 4: plugins(4)})
    found = save_checkpoint(folder, bert, "variator", {"shapes": {"2": "c"}, "training": {"2": "z"}}, {2: plugins(2)})
    assert found.settings == {"shapes": {"2": "c", "4": "b"}, "training": {"2": "z", "4": "y"}}
    found = save_checkpoint(folder, bert, "variator", {"shapes": {"4": "d"}}, {4: plugins(4)})
    assert found.settings == {"shapes": {"2": "c", "4": "d"}, "training": {"2": "z"}}


def test_in_place(tmp_path: Path, bert: Path, plugins: Callable[[int], Tensors]) -> None:
    model = Path(shutil.copytree(bert, tmp_path / "model"))
    before = contents(model)
    assert save_checkpoint(model, model, "variator", {}, {2: plugins(2)}).ratios == [2]
    after = contents(model)
    assert after.keys() - before.keys() == {DESCRIPTION, "variator-r2.safetensors"}
    assert before.items() <= after.items()


def test_a_folder_inside_the_model(tmp_path: Path, bert: Path, plugins: Callable[[int], Tensors]) -> None:
    model = Path(shutil.copytree(bert, tmp_path / "model"))
    save_checkpoint(model / "fitted", model, "variator", {}, {2: plugins(2)})
    assert not (model / "fitted" / "fitted").exists()


def test_another_backbone_is_refused(saved: Path, tmp_path: Path, plugins: Callable[[int], Tensors]) -> None:
    other = models.make("tiny-bert", tmp_path / "other", seed=1)
    before = contents(saved)
    with pytest.raises(InputError, match="already there: expected a new folder, or a checkpoint of the same backbone"):
        save_checkpoint(saved, other, "variator", {}, {2: plugins(2)})
    assert contents(saved) == before


def test_a_folder_with_something_else_is_refused(tmp_path: Path, bert: Path, plugins: Callable[[int], Tensors]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("keep me")
    with pytest.raises(InputError, match="already there"):
        save_checkpoint(tmp_path / "notes", bert, "variator", {}, {2: plugins(2)})
    assert list(contents(tmp_path / "notes")) == ["todo.txt"]


def test_changed_weights_no_longer_fit(saved: Path, tmp_path: Path) -> None:
    other = models.make("tiny-bert", tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", saved / "model.safetensors")
    assert "the variator tensors are of other weights; train them for this backbone" in refusal(saved)
    (saved / "tokenizer.json").unlink()
    assert "no usable tokenizer: expected tokenizer.json; put the files back" in refusal(saved)


@pytest.mark.parametrize(
    "name", ["../variator-r2.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "plugins.bin", "x.pt"]
)
def test_unsafe_names(saved: Path, name: str) -> None:
    edit(saved, files={"2": name})
    assert refusal(saved) == (
        f"{saved}/{DESCRIPTION}: unsafe file name: got '{name}', expected a .safetensors beside it"
    )


def test_newer_format(saved: Path) -> None:
    edit(saved, format=2)
    assert refusal(saved) == f"{saved}/{DESCRIPTION}: unknown format: got 2, expected 1; upgrade compexport"


def test_newer_format_with_other_keys(saved: Path) -> None:
    (saved / DESCRIPTION).write_text(json.dumps({"format": 2, "plugins": []}))
    assert "unknown format: got 2" in refusal(saved)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"format": 1, "method": "variator", "backbone_sha256": "", "files": [1]}']
)
def test_damaged_description(saved: Path, text: str) -> None:
    (saved / DESCRIPTION).write_text(text)
    assert f"{saved}/{DESCRIPTION}: unreadable: got " in refusal(saved)


def test_settings_that_are_no_object(saved: Path) -> None:
    edit(saved, settings=[1])
    refusal(saved)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_damaged_tensors(saved: Path, keep: int) -> None:
    path = saved / "variator-r2.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    found = find_checkpoint(saved)
    assert found is not None
    with pytest.raises(InputError, match="variator-r2.safetensors: unreadable: got .*, expected a safetensors file"):
        found.load(2)


def test_missing_tensors(saved: Path) -> None:
    (saved / "variator-r4.safetensors").unlink()
    found = find_checkpoint(saved)
    assert found is not None
    with pytest.raises(InputError, match="variator-r4.safetensors: missing; fit the ratio again with `compexport"):
        found.load(4)


def _interrupt(monkeypatch: pytest.MonkeyPatch, ratio: int) -> None:
    """Let writing the tensors of ``ratio`` stop half way."""
    real = safetensors.torch.save_file

    def save(tensors: Tensors, path: Path, *rest: Any) -> None:
        if f"-r{ratio}." in Path(path).name:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        real(tensors, path, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", save)


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, bert: Path, plugins: Callable[[int], Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "new", bert, "variator", {}, {2: plugins(2), 4: plugins(4)})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_addition_keeps_what_was_there(
    saved: Path, bert: Path, plugins: Callable[[int], Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved)
    _interrupt(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, bert, "variator", {}, {8: plugins(8)})
    assert before.items() <= contents(saved).items()
    found = find_checkpoint(saved)
    assert found is not None and found.ratios == [2, 4]


def test_an_interrupted_addition_leaves_nothing(
    saved: Path, bert: Path, plugins: Callable[[int], Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved)
    _interrupt(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, bert, "variator", {}, {8: plugins(8)})
    assert contents(saved) == before


def test_adding_a_ratio_does_not_change_the_pad_mode_of_others(
    saved: Path, bert: Path, plugins: Callable[[int], Tensors]
) -> None:
    with pytest.raises(InputError):
        save_checkpoint(saved, bert, "variator", {"pad": "official"}, {8: plugins(8)})


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "vocab.txt"])
def test_a_tokenizer_is_part_of_a_backbones_identity(bert: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(bert, tmp_path / "model")
    hashes = set()
    for content in (b"one", b"two"):
        (folder / name).write_bytes(content)
        hashes.add(backbone_sha256(folder))
    assert len(hashes) == 2
