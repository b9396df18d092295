"""The model folder that an import makes before it becomes part of a method checkpoint."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from compexport.errors import InputError, describe
from exporter.identity import VOCABULARIES

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# What a model folder of ours does not say: how a run was set up, and which library wrote the file.
OF_A_RUN = ("torch_dtype", "_name_or_path", "output_hidden_states", "output_attentions", "transformers_version")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *VOCABULARIES)


def require_no_root(output: Path) -> None:
    """InputError if ``output`` has no parent to stage it in."""
    if output.resolve() == output.resolve().parent:
        raise InputError(describe(f"{output}: is the root of the file system", expected="a folder in it"))


@contextmanager
def folder_near(output: Path) -> Iterator[Path]:
    """A temporary folder on the file system of ``output``, gone afterwards."""
    near = next(parent for parent in output.absolute().parents if parent.is_dir())
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=near))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def weights_file(folder: Path) -> Path:
    """The weights of an official folder; InputError if there are none."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise InputError(describe(f"{folder}: no weights", expected=" or ".join(WEIGHTS)))


def copy_tokenizer(source: Path, target: Path, hint: str) -> None:
    """The tokenizer's files of ``source``; InputError, with the ``hint``, if they make none."""
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not any((target / name).is_file() for name in ("tokenizer.json", *VOCABULARIES)):
        raise InputError(describe(f"{source}: no tokenizer", expected="vocab.txt or tokenizer.json", hint=hint))


def write_config(folder: Path, document: Mapping[str, Any]) -> None:
    """``config.json`` of a model folder."""
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """``model.safetensors`` of a model folder, in fp32."""
    from safetensors.torch import save_file

    stored = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
