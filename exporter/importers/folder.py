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


def write_config(folder: Path, document: Mapping[str, Any]) -> None:
    """``config.json`` of a model folder."""
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """``model.safetensors`` of a model folder, in fp32."""
    from safetensors.torch import save_file

    stored = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
