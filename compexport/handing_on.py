"""``compexport export``: one variant that reads a text and writes another, as a folder that optimum loads.

Its graphs and the tensors that they use, without the rest of the family. Files are copies: those of a bundle may have
no other names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compexport.errors import InputError, describe

if TYPE_CHECKING:
    from engines.bundle import Bundle

# What optimum looks for, by role.
FILES = {
    "encoder": "encoder_model.onnx",
    "decoder": "decoder_model.onnx",
    "decoder-with-past": "decoder_with_past_model.onnx",
}
WEIGHTS = "weights.bin"
# Where config.json says how many layers a stack has; BART says it of the encoder twice.
_LAYERS: dict[str, dict[str, Literal["encoder", "decoder"]]] = {
    "t5": {"num_layers": "encoder", "num_decoder_layers": "decoder"},
    "bart": {"encoder_layers": "encoder", "num_hidden_layers": "encoder", "decoder_layers": "decoder"},
}
_LAYERS["mbart"] = _LAYERS["bart"]
_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"


def export(bundle: str | Path, output: str | Path, variant: str | None = None) -> dict[str, Any]:
    """Write one variant, by default that of ratio 1, to the new folder ``output``.

    Raises InputError for a bundle of another task, an unknown variant, and an output that holds something already.
    """
    from compexport.api import open_bundle
    from engines.atomic import remove, temporary
    from engines.manifest import TEXT2TEXT, backbones

    opened, target = open_bundle(bundle), Path(output).absolute()
    manifest = opened.manifest
    if manifest.task != TEXT2TEXT:
        raise InputError(describe("export is for bundles of one task", got=manifest.task, expected=TEXT2TEXT))
    name = variant or backbones(manifest.variants)[0]
    if name not in manifest.variants:
        raise InputError(describe("unknown variant", got=name, expected=f"one of {', '.join(manifest.variants)}"))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(describe(f"output {output} exists", hint="choose another output"))
    staged = temporary(target)
    try:
        staged.mkdir(parents=True)
        _write(opened, name, staged)
        os.replace(staged, target)
    except OSError as error:
        raise InputError(describe(f"cannot write to {output}", got=error)) from error
    finally:
        remove(staged)
    files = sorted(path.name for path in target.iterdir())
    size = sum((target / file).stat().st_size for file in files)
    return {"bundle": str(bundle), "variant": name, "output": str(output), "files": files, "size_bytes": size}


def _write(bundle: Bundle, name: str, folder: Path) -> None:
    from engines.manifest import MODEL_SETTINGS
    from exporter.weights import WeightsFile

    manifest = bundle.manifest
    variant = manifest.variants[name]
    with WeightsFile(folder / WEIGHTS) as weights:
        for role, file in FILES.items():
            graph = manifest.graphs[variant.graphs[role]]
            bundle.file(f"{Path(graph.path).parent.as_posix()}/{WEIGHTS}")
            weights.adopt(bundle.file(graph.path), folder / file)
    for path in sorted(manifest.files):
        if path.startswith(f"{MODEL_SETTINGS}/"):
            shutil.copyfile(bundle.file(path), folder / Path(path).name)
    if manifest.tokenizer is not None:
        shutil.copyfile(bundle.file(manifest.tokenizer.path), folder / "tokenizer.json")
    keys = _LAYERS[manifest.backbone.model_type]
    assert variant.assembly is not None
    tiles = {stack: len(sizes) for stack, sizes in variant.assembly.items()}
    _change(folder / _CONFIG, {key: tiles[stack] for key, stack in keys.items()})
    if (folder / _TOKENIZER_CONFIG).is_file():
        _change(folder / _TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"})


def _change(path: Path, values: Mapping[str, Any]) -> None:
    document = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
