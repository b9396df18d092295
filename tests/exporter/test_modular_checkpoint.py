"""Modular checkpoints: one file of modules for all assemblies, and what its description must agree with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from compexport.errors import InputError
from exporter.backbone import load_backbone, load_seq2seq
from exporter.checkpoint import DESCRIPTION, find_checkpoint
from exporter.methods.assembly import Assembly
from exporter.methods.modular import ModularModel
from exporter.methods.modular_checkpoint import load_modular, save_modular, untrained_modular
from exporter.methods.modular_settings import ModularSettings

TASK = "text2text-generation"
FILE = "modular.safetensors"
SMALL = Assembly((6, 6), (6, 6))


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    return tiny("tiny-t5-gated-twelve", TASK)


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a named assembly. Do not write into it."""
    output = tmp_path_factory.mktemp("modular") / "checkpoint"
    model = untrained_modular(load_seq2seq(folder), seed=4)
    save_modular(output, model, training={"steps": 10}, assemblies={"small": SMALL})
    return output


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_modules_come_back(folder: Path, saved: Path) -> None:
    model, again = untrained_modular(load_seq2seq(folder), seed=4), load_modular(saved)
    assert again.module_tensors().keys() == model.module_tensors().keys()
    for name, tensor in model.module_tensors().items():
        assert torch.equal(again.module_tensors()[name], tensor)
    settings = ModularSettings.of(find_checkpoint(saved, "modular"))  # type: ignore[arg-type]
    assert settings.assemblies == {"small": SMALL}
    assert settings.facts == model.facts
    assert settings.training == {"steps": 10}


def test_the_layout(folder: Path, saved: Path) -> None:
    names = safetensors.torch.load_file(saved / FILE)
    kinds = {".".join(name.split(".")[:4]) for name in names}
    assert kinds == {
        f"modules.{stack}.g{size}.{j}"
        for stack in ("encoder", "decoder")
        for size in (2, 3, 4, 6)
        for j in range(12 // size)
    }
    suffixes = {name.split(".", 4)[4] for name in names if name.startswith("modules.decoder.g3.0.")}
    state = load_seq2seq(folder).model.state_dict()
    assert suffixes == {name.split(".", 3)[3] for name in state if name.startswith("decoder.block.1.")}
    document = json.loads((saved / DESCRIPTION).read_text())
    assert (document["method"], document["file"]) == ("modular", FILE)
    assert "files" not in document
    settings = document["settings"]
    assert settings["granularities"] == {"encoder": [2, 3, 4, 6], "decoder": [2, 3, 4, 6]}
    assert settings["base_layers"] == {"encoder": 12, "decoder": 12}
    assert (settings["init_rule"], settings["assemblies"]) == ("first", {"small": SMALL.document()})
    theirs = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {name: (saved / name).read_bytes() for name in theirs} == theirs, "the base is untouched"


def test_modules_start_as_their_spans_first_or_last_layers(folder: Path) -> None:
    base = load_seq2seq(folder)
    layers = base.model.encoder.block
    for rule, index in (("first", 4), ("last", 7)):
        tensors = ModularModel(base, init_rule=rule).module_tensors()  # type: ignore[arg-type]
        for name, tensor in layers[index].state_dict().items():
            assert torch.equal(tensors[f"modules.encoder.g4.1.{name}"], tensor)


def test_saving_anew_replaces_modules_and_names(copy: Path) -> None:
    model = load_modular(copy)
    with torch.no_grad():
        for parameter in model.module_parameters():
            parameter += 1
    save_modular(copy, model, assemblies={"other": SMALL})
    again = load_modular(copy)
    assert all(torch.equal(again.module_tensors()[n], t) for n, t in model.module_tensors().items())
    assert find_checkpoint(copy).settings["assemblies"].keys() == {"other"}  # type: ignore[union-attr]


def test_few_sizes_and_stacks_of_unlike_depth(tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=30,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_heads=2,
        num_layers=4,
        num_decoder_layers=3,
        decoder_start_token_id=0,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    model = ModularModel(load_seq2seq(tmp_path / "t5"), granularities=[2, 3], init_rule="last")
    assert (model.facts.encoder.granularities, model.facts.decoder.granularities) == ((2,), (3,))
    save_modular(tmp_path / "out", model)
    again = load_modular(tmp_path / "out")
    assert (again.facts, again.init_rule) == (model.facts, "last")
    assembled = again.assemble(Assembly((2, 2), (3,)))
    ids = torch.ones((1, 3), dtype=torch.long)
    assert assembled(input_ids=ids, decoder_input_ids=ids).logits.shape == (1, 3, 30)


def _edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / DESCRIPTION).read_text())
    document["settings"] |= changes
    (folder / DESCRIPTION).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_rule": "middle"}, "init rule: got middle, expected first or last"),
        ({"facts": None}, "compexport.json: no facts of a modular model: got None"),
        ({"assemblies": {"a": {"encoder": [6]}}}, "a: no assembly: got"),
        (
            {"assemblies": {"a": {"encoder": [6, 6], "decoder": [1, 2, 3, 6]}}},
            "assembly a: decoder: tile of size 2: got start 1, expected a multiple of 2",
        ),
    ],
)
def test_a_description_that_does_not_fit(changes: dict[str, Any], message: str, copy: Path) -> None:
    _edit(copy, **changes)
    with pytest.raises(InputError, match=message):
        load_modular(copy)


def test_facts_of_another_base(copy: Path) -> None:
    facts = json.loads((copy / DESCRIPTION).read_text())["settings"]["facts"]
    _edit(copy, facts={**facts, "vocabulary": 7})
    with pytest.raises(
        InputError, match="compexport.json: facts: got .*'vocabulary': 7.*, expected those of its model"
    ):
        load_modular(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {n: x for n, x in t.items() if n != "modules.encoder.g2.3.layer.0.layer_norm.weight"},
            r"modular.safetensors: modules.encoder.g2.3.layer.0.layer_norm.weight: got nothing, expected \(16,\)",
        ),
        (
            lambda t: {**t, "modules.encoder.g5.0.x": torch.ones(1)},
            r"modules.encoder.g5.0.x: got \(1,\), expected no such",
        ),
    ],
)
def test_a_file_that_does_not_fit(change: Any, message: str, copy: Path) -> None:
    tensors = safetensors.torch.load_file(copy / FILE)
    safetensors.torch.save_file(change(tensors), copy / FILE)
    with pytest.raises(InputError, match=message):
        load_modular(copy)


def test_what_is_no_modular_checkpoint(folder: Path, copy: Path, tiny: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no modules: got a bare model; fit modules with `compexport train modular`"):
        load_modular(folder)
    with pytest.raises(InputError, match="a checkpoint of another method: got modular, expected variator"):
        find_checkpoint(copy, "variator")
    (copy / FILE).unlink()
    with pytest.raises(
        InputError, match="modular.safetensors: missing; fit them again with `compexport train modular`"
    ):
        load_modular(copy)
    with pytest.raises(InputError, match="no encoder-decoder model: got 'bert', expected one of bart, mbart, t5"):
        load_seq2seq(tiny("tiny-bert"))
    with pytest.raises(InputError, match="weights are missing: .* expected a text2text-generation model"):
        load_seq2seq(tiny("tiny-t5"))


def test_loading_says_how_to_generate(folder: Path, tiny: Callable[..., Path]) -> None:
    t5, bart = load_seq2seq(folder), load_seq2seq(tiny("tiny-bart-twelve", TASK))
    assert (t5.generation.start, t5.generation.eos, t5.generation.pad) == (0, (1,), 0)
    assert (bart.generation.start, bart.generation.eos, bart.generation.forced_eos) == (2, (2,), 2)
    assert (t5.max_length, bart.max_length) == (160, 160)
    assert not any(parameter.requires_grad for parameter in t5.model.parameters())
    # Such folders still serve as encoders.
    assert load_backbone(folder).task == "feature-extraction"
