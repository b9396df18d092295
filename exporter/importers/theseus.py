"""BERT-of-Theseus checkpoints, turned into the plain shorter BERT that their successors are.

Such a checkpoint holds a BERT's layers, its predecessors, and beside them successors, each of which learnt to stand for
as many consecutive layers; running successors only is running a BERT of their number of layers.
Source: the official code of BERT-of-Theseus (github JetRunner/BERT-of-Theseus), read for its names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compexport.errors import InputError, describe
from exporter.backbone import Backbone, load_backbone, load_config
from exporter.identity import file_sha256
from exporter.importers.folder import (
    OF_A_RUN,
    copy_tokenizer,
    folder_near,
    require_no_root,
    weights_file,
    write_config,
    write_weights,
)
from exporter.importers.tensors import read_safetensors, read_tensors, require_shapes

_PREDECESSOR = re.compile(r"bert\.encoder\.layer\.(\d+)\.")
_SUCCESSOR = re.compile(r"bert\.encoder\.scc_layer\.(\d+)\.")
_NO_WEIGHTS = ("bert.embeddings.position_ids",)  # 0, 1, 2, ..., which later versions of the library write along
_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@dataclass(frozen=True)
class ImportedSuccessors:
    """What an import wrote: ``layers`` successors, each for ``span`` of the ``replaced`` layers."""

    method: str
    output: str
    task: str
    layers: int
    replaced: int
    span: int
    params: int
    tensors: int
    source_sha256: str

    def document(self) -> dict[str, Any]:
        return asdict(self)


def import_theseus(folder: str | Path, output: str | Path) -> ImportedSuccessors:
    """Write the model folder ``output``, which must not hold anything yet, from an official folder.

    InputError for anything that does not fit, in which case nothing was written.
    """
    folder, output = Path(folder), Path(output)
    require_no_root(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(describe(f"{output}: already there", expected="a new folder"))
    raw = _read_config(folder)
    file = weights_file(folder)
    read = read_safetensors if file.suffix == ".safetensors" else read_tensors
    tensors = read(file, skip=_NO_WEIGHTS)
    layers = _count(_SUCCESSOR, tensors, file, "successors")
    replaced = int(raw["num_hidden_layers"])
    _require_spans(layers, replaced, tensors, file)
    plain = _as_layers(tensors)
    with folder_near(output) as made:
        document = {name: value for name, value in raw.items() if name not in OF_A_RUN}
        write_config(made, {**document, "num_hidden_layers": layers, "dtype": "float32"})
        _require_all_used(made, plain, file)
        copy_tokenizer(folder, made, "copy that of the BERT it was made from into the folder")
        write_weights(made, plain)
        loaded = load_backbone(made)  # a folder that could not be built from must not be written
        _ = loaded.tokenizer_json
        made.chmod(0o755)
        os.replace(made, output)
    return _imported(output, loaded, layers, replaced, len(plain), file)


def _imported(
    output: Path, loaded: Backbone, layers: int, replaced: int, tensors: int, file: Path
) -> ImportedSuccessors:
    return ImportedSuccessors(
        method="theseus",
        output=str(output),
        task=loaded.task,
        layers=layers,
        replaced=replaced,
        span=replaced // layers,
        params=loaded.params,
        tensors=tensors,
        source_sha256=file_sha256(file),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """``config.json``, of a BERT with a head; versions of that time did not name the kind of model."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        layers = raw["num_hidden_layers"]
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise ValueError(f"num_hidden_layers {layers}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        got = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise InputError(describe(f"{path}: unreadable", got=got, expected="a BERT's configuration")) from error
    made: dict[str, Any] = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **raw}
    if made["model_type"] != "bert":
        raise InputError(describe(f"{path}: model_type", got=repr(made["model_type"]), expected="'bert'"))
    named = str((made["architectures"] or ["none"])[0])
    if named not in {f"Bert{head}" for head in _HEADS}:
        expected = " or ".join(f"Bert{head}" for head in _HEADS)
        raise InputError(describe(f"{path}: architectures", got=named, expected=expected))
    return made


def _count(pattern: re.Pattern[str], tensors: Mapping[str, Tensor], file: Path, what: str) -> int:
    """How many layers of a kind there are; InputError if there are none or one between them is missing."""
    found = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    if not found:
        hint = "compexport knows checkpoints with bert.encoder.scc_layer.* in them"
        raise InputError(describe(f"{file}: no {what}", got="a plain model", hint=hint))
    if found != set(range(len(found))):
        missing = min(set(range(max(found))) - found)
        raise InputError(describe(f"{file}: {what}", got=f"none of number {missing}", expected=f"0 to {max(found)}"))
    return len(found)


def _require_spans(layers: int, replaced: int, tensors: Mapping[str, Tensor], file: Path) -> None:
    predecessors = _count(_PREDECESSOR, tensors, file, "predecessors")
    if predecessors != replaced:
        raise InputError(describe(f"{file}: predecessors", got=predecessors, expected=f"{replaced}, as in config.json"))
    if replaced % layers:
        expected = f"a number that divides its {replaced} layers"
        raise InputError(describe(f"{file}: successors", got=layers, expected=expected))


def _as_layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Successors under the names of layers, predecessors left out."""
    kept = {name: tensor for name, tensor in tensors.items() if not _PREDECESSOR.match(name)}
    return {_SUCCESSOR.sub(r"bert.encoder.layer.\1.", name): tensor for name, tensor in kept.items()}


def _require_all_used(made: Path, tensors: Mapping[str, Tensor], file: Path) -> None:
    import transformers

    config = load_config(made)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    require_shapes(file, tensors, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
