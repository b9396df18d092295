"""Official COST-EFF checkpoints, turned into our method checkpoint.

Such a checkpoint is a Hugging Face folder of a slender multi-exit BERT: ``config.json``, its weights, a tokenizer. The
teacher it was made from is another folder; where it is not given, the same function at full width stands in for it.
Source: the official code of COST-EFF (arXiv 2210.15523). Letters: V words, H hidden size, e rank of the word table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compexport.errors import InputError, describe
from exporter.backbone import Backbone, load_backbone
from exporter.checkpoint import find_checkpoint, save_checkpoint
from exporter.identity import backbone_sha256, file_sha256
from exporter.importers.costeff_config import OfficialConfig, read_official_config
from exporter.importers.folder import (
    copy_tokenizer,
    folder_near,
    require_no_root,
    weights_file,
    write_config,
    write_weights,
)
from exporter.importers.tensors import promoted, read_safetensors, read_tensors
from exporter.methods.costeff import CosteffModel
from exporter.methods.costeff_checkpoint import stored_tensors
from exporter.methods.slender import HostFacts, SlenderShape, rounded_ratio
from exporter.methods.slender_weights import LAYER, WORDS, WORDS_LEFT, WORDS_RIGHT

# What two configurations of one host have in common; how it is trained is nobody's business here.
_TRAINING_ONLY = {"dropout", "attention_dropout", "classifier_dropout", "initializer_range"}


@dataclass(frozen=True)
class ImportedModel:
    """What an import wrote. ``ratio`` is that of the layers' matrices; ``ratios`` are all in ``output``.

    ``params`` are those of the slender model, ``params_share`` their share of the backbone's.
    """

    method: str
    output: str
    ratio: float
    ratios: list[float]
    shape: dict[str, Any]
    params: int
    params_share: float
    tensors: int
    backbone: str
    backbone_from_file: bool

    def document(self) -> dict[str, Any]:
        return asdict(self)


def import_costeff(folder: str | Path, backbone: str | Path | None, output: str | Path) -> ImportedModel:
    """Write the method checkpoint ``output`` from an official folder and, where there is one, its teacher's.

    ``backbone`` is a BERT of the same sizes, fine-tuned on the same labels. Without it, the checkpoint's own function
    is written out at full width and becomes the backbone. ``output`` is new, or an earlier import with the same
    backbone, which gains the ratio or gets it replaced. InputError for anything that does not fit, in which case
    nothing was written.
    """
    folder, output = Path(folder), Path(output)
    require_no_root(output)
    config = read_official_config(folder)
    file = weights_file(folder)
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_tensors(file)
    model = CosteffModel.from_tensors({n: promoted(t) for n, t in tensors.items()}, config.facts, str(file))
    _require_as_configured(model, config, folder)
    with _backbone_folder(folder, None if backbone is None else Path(backbone), output, model, config) as source:
        loaded = load_backbone(source)  # a folder that could not be built from must not be written
        _ = loaded.tokenizer_json
        _require_teacher(loaded, config, folder)
        _require_its_backbone(output, source, backbone)
        ratio = rounded_ratio(model.shape, config.facts, str(folder))
        settings = _settings(file, model, config, ratio, backbone is None)
        saved = save_checkpoint(output, source, "costeff", settings, {ratio: stored_tensors(model, loaded)})
    return ImportedModel(
        method="costeff",
        output=str(output),
        ratio=ratio,
        ratios=saved.ratios,
        shape=model.shape.document(),
        params=model.params,
        params_share=model.params / loaded.params,
        tensors=len(tensors),
        backbone=str(folder if backbone is None else backbone),
        backbone_from_file=backbone is None,
    )


def _require_as_configured(model: CosteffModel, config: OfficialConfig, folder: Path) -> None:
    """InputError where config.json speaks of another model than the tensors are.

    Widths that differ from layer to layer are taken as they are: config.json has one number for all.
    """
    shape = model.shape
    pairs: list[tuple[str, object, object]] = [
        ("num_labels", model.num_labels, len(config.labels)),
        ("emb_hidden_dim", shape.embedding or -1, config.rank or -1),
        ("pooling_mode", "concat" if model.mean else "cls", "cls"),
        ("pooler_dense", (model.pooler_dense, model.highway_dense), (config.pooler_dense,) * 2),
    ]
    if len(set(shape.heads)) == 1:
        pairs.append(("num_attention_heads", shape.heads[0], config.heads))
    if len(set(shape.neurons)) == 1:
        pairs.append(("prun_intermediate_size", shape.neurons[0], config.neurons))
    for name, got, said in pairs:
        if got != said:
            what = f"{folder}: the tensors are not those that config.json describes: {name}"
            raise InputError(describe(what, got=_shown(got), expected=_shown(said)))


def _shown(value: object) -> object:
    """The poolers of the final classifier and of the exits, where one word does not say both."""
    if isinstance(value, tuple):
        return value[0] if value[0] == value[1] else f"{value[0]}, of the exits {value[1]}"
    return value


def _require_teacher(backbone: Backbone, config: OfficialConfig, folder: Path) -> None:
    """InputError unless the slender model could have been made from this backbone."""
    if backbone.task != "sequence-classification" or len(backbone.labels) != len(config.labels):
        got = f"a model for {backbone.task} with {len(backbone.labels)} labels"
        expected = f"sequence-classification with {len(config.labels)}"
        raise InputError(describe(f"{backbone.folder}: no teacher of {folder}", got=got, expected=expected))
    theirs, ours = asdict(config.facts), asdict(HostFacts.of(backbone))
    for field in fields(HostFacts):
        name = field.name
        if name not in _TRAINING_ONLY and theirs[name] != ours[name]:
            what = f"{backbone.folder}: another model than {folder} was made from: {name.replace('_', ' ')}"
            raise InputError(describe(what, got=ours[name], expected=theirs[name]))
    if _named(backbone.labels) and _named(config.labels) and backbone.labels != config.labels:
        what = f"{backbone.folder}: other labels than {folder}"
        raise InputError(describe(what, got=", ".join(backbone.labels), expected=", ".join(config.labels)))
    if _other_words(backbone.folder, folder):
        raise InputError(describe(f"{backbone.folder}/vocab.txt: other words than {folder}/vocab.txt"))


def _require_its_backbone(output: Path, source: Path, backbone: str | Path | None) -> None:
    """InputError where ``output`` has another backbone than this checkpoint brings along."""
    found = find_checkpoint(output, "costeff") if backbone is None else None
    if found is not None and found.backbone_sha256 != backbone_sha256(source):
        hint = "a checkpoint without --backbone brings its own; name the teacher of all of them"
        raise InputError(
            describe(f"{output}: already there", got="another backbone", expected="a new folder", hint=hint)
        )


def _named(labels: list[str]) -> bool:
    return labels != [f"LABEL_{i}" for i in range(len(labels))]


def _other_words(one: Path, other: Path) -> bool:
    files = [path / "vocab.txt" for path in (one, other)]
    return all(file.is_file() for file in files) and len({file.read_text(encoding="utf-8") for file in files}) > 1


# --- the backbone's folder -------------------------------------------------------------------------------------------


@contextmanager
def _backbone_folder(
    folder: Path, backbone: Path | None, output: Path, model: CosteffModel, config: OfficialConfig
) -> Iterator[Path]:
    """The teacher's folder, or a temporary one near ``output`` with the checkpoint's own function at full width."""
    if backbone is not None:
        yield backbone
        return
    with folder_near(output) as made:
        hint = "copy that of the BERT it was made from into the folder, or name its teacher with --backbone"
        copy_tokenizer(folder, made, hint)
        write_config(made, config.full_width)
        write_weights(made, at_full_width(model.state_dict(), config.facts, model.shape))
        yield made


def at_full_width(tensors: Mapping[str, Tensor], facts: HostFacts, shape: SlenderShape) -> dict[str, Tensor]:
    """The same function as a plain BERT classifier: what was taken away is zero, exits are left out.

    A head whose output columns are zero adds nothing, nor does a neuron; and tanh of the first token is a dense pooler
    whose matrix is the identity.
    """
    made = {n: t for n, t in tensors.items() if ".highway." not in n and n not in (WORDS_LEFT, WORDS_RIGHT)}
    if shape.embedding is not None:
        made[WORDS] = (tensors[WORDS_LEFT].double() @ tensors[WORDS_RIGHT].double().T).float()
    for layer in range(facts.layers):
        prefix = f"{LAYER}{layer}."
        for name in ("query", "key", "value"):
            for part in ("weight", "bias"):
                _pad(made, f"{prefix}attention.self.{name}.{part}", 0, facts.hidden)
        for part in ("weight", "bias"):
            _pad(made, f"{prefix}intermediate.dense.{part}", 0, facts.neurons)
        _pad(made, f"{prefix}attention.output.dense.weight", 1, facts.hidden)
        _pad(made, f"{prefix}output.dense.weight", 1, facts.neurons)
    identity = {
        "bert.pooler.dense.weight": torch.eye(facts.hidden),
        "bert.pooler.dense.bias": torch.zeros(facts.hidden),
    }
    return {**identity, **made}


def _pad(tensors: dict[str, Tensor], name: str, axis: int, size: int) -> None:
    tensor = tensors[name]
    missing = list(tensor.shape)
    missing[axis] = size - tensor.shape[axis]
    tensors[name] = torch.cat([tensor, tensor.new_zeros(missing)], dim=axis)


def _settings(file: Path, model: CosteffModel, config: OfficialConfig, ratio: float, from_file: bool) -> dict[str, Any]:
    """What ``compexport.json`` says of this ratio; tables by ratio add to those that are there."""
    source = {
        "file": file.name,
        "sha256": file_sha256(file),
        "backbone": "the same function at full width" if from_file else "given",
        "kept_heads": config.kept_heads,
    }
    return {
        "shapes": {str(ratio): model.shape.document()},
        "imported": {str(ratio): source},
    }
